"""Name tables between our parameter trees and everybody's files."""
