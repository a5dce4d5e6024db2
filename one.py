import sys, os, time, json, subprocess, urllib.request, tempfile
os.environ['NO_ALBUMENTATIONS_UPDATE']='1'; sys.modules["torch"]=None
sys.path.insert(0,'/tmp/i2m.ykjqyO/v')
from data_prep import img2ds_child
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
import pyarrow as pa
p=subprocess.Popen([sys.executable,"tests/data_prep/http_server.py"],stdin=subprocess.PIPE,stdout=subprocess.PIPE,text=True)
a=p.stdout.readline().strip()
for i in range(200): urllib.request.urlopen(f"{a}/photo/{i}.jpg").read()
ours=img2ds_child.Opener(dict(image_seconds=60,max_image_bytes=64<<20,allow_private_addresses=True,local_root=None,user_agent_token="x",disallowed_header_directives=["noai","noindex"],started="/tmp/i2m.ykjqyO/st"))
default=urllib.request.build_opener()
N=500
with tempfile.TemporaryDirectory() as t:
    tab=pa.table({"row":list(range(N)),"caption":["c"]*N,"url":[f"{a}/photo/{i%200}.jpg?{i}" for i in range(N)]})
    def go(op):
        urllib.request.install_opener(op)
        with pa.ipc.new_file(f"{t}/x.feather",tab.schema) as w: w.write_table(tab)
        d=Downloader(WebDatasetSampleWriter,Resizer(256,"keep_ratio",True),16,True,True,t,["row","caption","url"],10,1000,5,"sha256",None,"jpg",2,"x",["noai","noindex"])
        c=time.process_time(); s=time.time(); d((0,f"{t}/x.feather")); return time.time()-s, time.process_time()-c
    W={"ours":[], "default":[]}; C={"ours":[], "default":[]}
    for k in range(8):
        for n,o in (("ours",ours),("default",default))[::1 if k%2 else -1]:
            w,c=go(o); W[n].append(w); C[n].append(c)
    import statistics as st
    for n in W: print(n,"wall",[round(x,2) for x in W[n]],"cpu",[round(x,2) for x in C[n]], "medians", round(st.median(W[n]),2), round(st.median(C[n]),2))
    print("ratio medians of pairs", st.median(x/y for x,y in zip(W["ours"],W["default"])), st.median(x/y for x,y in zip(C["ours"],C["default"])))
p.stdin.close()
