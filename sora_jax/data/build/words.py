"""Numbers as a reader says them: counts, spans of time, sizes of files."""


def count(number: int) -> str:
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def span(seconds: float | int) -> str:
    """Seconds as at most two units: "9.4 s", "3 min 20 s", "2 h 5 min", "1,204 h"."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 59.95 else "1 min"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours < 100 else f"{round(seconds / 3600):,} h"


def size(number: float | int) -> str:
    """Bytes in decimal units: "812 B", "3.4 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:,.0f} {unit}"


def short(value: float | int) -> str:
    """Three digits, with no exponent for what people read: "0.033", "12,400"."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.0e}"
    return f"{value:.3g}"
