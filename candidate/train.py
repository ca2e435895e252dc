"""scratch: CPU fine-tuning of the shipped weights on what it draws wrong."""
import sys, time, json, os, dataclasses, queue
from pathlib import Path
import numpy as np
sys.path.insert(0,str(Path(__file__).parents[1]))
from sora_jax.data.paperworld.settings import PaperworldSettings as W
from tools import drawn_rows as dr
from tools import train_by_clock as tc

OUT=Path(sys.argv[1]); SECONDS=float(sys.argv[2]); RATE=float(sys.argv[3]); CL=int(sys.argv[4]); IM=int(sys.argv[5])
ONE=dr.ONE
TURNED_CAM={"turning":.9,"falling":.0,"small":.4,"moving_camera":.35,**ONE}
TILT={"tilted":1.0,"occlusion":0.0,"turning":.15,"small":.35,"moving_camera":.12,**ONE}
class Focus:
    """scenes whose subject is a box or fish, at a share"""
    def __init__(s,src,share): s.src,s.share=src,share
base=dr.PaperworldSource
FOCUS_FROM=6 # kinds from this index on are focused
CL_KINDS=((.8,W()),(.5,W(**dr.HARD)),(.3,W(**dr.SHOTS)),(.2,W(late=1.0,collisions=0.0)),(.05,W(near=1.0)),(.25,W(**ONE|{"collisions":1.0})),
   (1.0,W(**TILT)),(.5,W(**TURNED_CAM)),(1.3,W(scraps=1.0,turning=.75,tilted=.4,small=.3,moving_camera=.2,occlusion=0.,**ONE)))
IM_KINDS=((5,W(frames=1)),(4,W(frames=1,**dr.HARD)),(4,W(frames=1,tilted=.8,**ONE)),(2,W(frames=1,scraps=1.,turning=.5,**ONE)))
class Source(base):
    def _at(s,i):
        if s.settings.scraps or s.settings.tilted<.7 and not (s.settings.turning>.8): return i
        for k in range(8):
            j=i*8+k
            sub=s.scene(j).subject
            if sub.shape in ("box","fish") or k==7: return j
            if np.random.default_rng([j,5]).random()<.35: return j
        return j
    def __getitem__(s,i): return base.__getitem__(s,s._at(i))
    def captions(s,i,n): return base.captions(s,s._at(i),n)
dr.PaperworldSource=Source
dr.SEED=int(sys.argv[6]) if len(sys.argv)>6 else 90
INIT=sys.argv[7] if len(sys.argv)>7 else "paperworld"
ROWS=4
def main():
    from sora_jax import checkpoint_path
    init=str(checkpoint_path(INIT))
    clips=dr.Records(CL_KINDS,dr.FRAMES,count=CL,workers=2); images=dr.Records(IM_KINDS,1,count=IM,workers=2)
    procs,stop=dr.start_drawing((clips,images),init)
    import jax, jax.numpy as jnp
    from sora_jax import sharding
    from sora_jax.convert import folder, rewrite
    
    while len(clips.available())<CL-2 or len(images.available())<IM-2:
        time.sleep(2)
    stop.value=1
    tc.say("drawn",len(clips.available()),len(images.available()))
    mesh=sharding.make_mesh(devices=jax.devices()[:1]); log=[]
    settings,_,params=folder.load_component(init,"vae",mesh=mesh)
    rows={"clips":tc.Rows(clips,ROWS,in_row=1,text=dr.WORDS),"images":tc.Rows(images,ROWS,in_row=dr.IN_ROW,text=dr.IMAGE_TEXT)}
    class A: pass
    args=A(); args.init=init; args.rows=ROWS; args.shift=4.0; args.rate=RATE
    tc.WAYS=(("full",False),("full",False))
    begun=tc.begin_dit(args,rows,mesh); tc.say("compiled")
    lat=tc.Latents(rows,tc.encoder(settings,params),mesh)
    cache=OUT.with_suffix(".lat.npz")
    lat.renew(); tc.say("encoded")
    built,state,kinds=begun
    frozen=built.stage.frozen
    steps={k:next(iter(w.values())) for k,w in kinds.items()}
    batches=lat.batches(every=1e9)
    def save(state,name):
        out=OUT.parent/(OUT.name+name); out.mkdir(parents=True,exist_ok=True)
        rewrite.copy_companions(Path(init),out)
        parts={"vae":rewrite.from_params("vae",settings,params),"dit":rewrite.from_params("dit",built.stage.dit_config,state.ema["dit"]),"text":rewrite.from_params("text",built.stage.text.config,state.ema["text"])}
        rewrite.write_diffusers(out,parts,dtype="bfloat16"); tc.say("wrote",out)
    key=jax.random.key(int(dr.SEED)); first=time.time(); done=0; losses={"clips":[],"images":[]}; nxt=1500
    while time.time()-first<SECONDS:
        share=(time.time()-first)/SECONDS
        kind,batch=next(batches)
        state,m=steps[kind](state,frozen,batch,key,jnp.int32(share*tc.VIRTUAL))
        losses[kind].append(float(m["train/loss"])); done+=1
        if done%100==0:
            tc.say(done,f"{done/(time.time()-first):.3f}/s",{k:round(float(np.mean(v[-150:])),4) for k,v in losses.items() if v})
        if time.time()-first>nxt and SECONDS-nxt>600:
            save(state,f"_{nxt}"); nxt+=1500
    save(state,"")
main()
