# Every rule is derived from dvc.yaml: DVC decides what is stale, Snakemake decides when and where it runs.
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir)))
sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from casemate.errors import UserError
from casemate.params import load_params
from pipeline import dag as dvc_dag

try:
    load_params(Path("params.yaml"))
except UserError as error:
    sys.exit(f"error: {error}")

os.environ["CASEMATE_ENGINE"] = str(os.getpid())  # not a rule's param: a new one would make every rule stale
stages = dvc_dag.load(workflow.basedir)
if workflow.is_main_process:
    engine_lock = dvc_dag.hold_engine_lock()
    dvc_dag.sync_stamps(stages, workflow.basedir)


rule all:
    input: [s.stamp for s in stages.values()]
    localrule: True
    default_target: True


for s in stages.values():

    rule:
        name: s.rule
        input: [stages[u].stamp for u in s.upstream]
        output: touch(s.stamp)
        localrule: s.local
        threads: s.threads
        resources: **s.resources
        params: stage=s.name, gpus=s.resources.get("gpu", 0), python=sys.executable
        log: f".snakemake/stage-logs/{s.rule}.log"
        message: s.name
        shell: "{params.python} -m pipeline.run_stage {params.stage} {params.gpus} > {log} 2>&1"
