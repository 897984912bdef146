"""datatrove's Slurm executor, with sbatch, srun and scontrol played by shell scripts: no Slurm is needed, or tested."""

import importlib.util
import os
import shutil
import stat
import sys
from pathlib import Path

from stub_llm_server import StubServer
from think_runs import contents, think_config, write_corpus

from megatron_ptrl.thinking.pipeline import run

STUBS = {
    # Runs every index of the array, one after the other, and answers with a job number.
    "sbatch": r"""#!/bin/bash
script="${@: -1}"
range=$(grep -oP '#SBATCH --array=\K[0-9-]+' "$script" | head -1)
cp "$script" "$STUB_LOG.script"
for i in $(seq ${range%-*} ${range#*-}); do
  SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_JOB_ID=7 SLURM_JOB_ID=7 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_NNODES=1 \
  SLURM_JOB_NODELIST=localhost SLURM_NODELIST=localhost SLURM_CPUS_PER_TASK=1 SLURM_MEM_PER_CPU=1 SLURM_GPUS_ON_NODE=0 \
  bash "$script" >> "$STUB_LOG" 2>&1
done
echo 7
""",
    "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho localhost\n",
}


def test_an_array_job_writes_the_same_bytes_and_the_next_call_assembles(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    specification = importlib.util.find_spec("datatrove")
    assert specification and specification.origin
    # Where pip put the commands of datatrove: beside this Python, or below the folder it was installed to.
    folders = [Path(sys.executable).parent, Path(specification.origin).parents[1] / "bin"]
    commands = shutil.which("launch_pickled_pipeline", path=os.pathsep.join(map(str, folders)))
    assert commands
    path = f"{tmp_path / 'bin'}:{Path(commands).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "slurm.log"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-this-must-not-be-seen-0123456789")
    sources = [write_corpus(tmp_path / f"{i}.jsonl", 10, first=10 * i) for i in range(2)]
    with StubServer(tmp_path / "log") as server:
        run(think_config(sources, tmp_path / "expected", [server.url], part_megabytes=1e-6))
        config = think_config(
            sources,
            tmp_path / "out",
            [server.url],
            part_megabytes=1e-6,
            tasks=2,
            kind="slurm",
            partition="cpu",
            env_command=f"export PATH={path}",
        )
        run(config)
        assert "2 of 2 parts submitted; repeat the command when they are done" in capsys.readouterr().out
        log = (tmp_path / "slurm.log").read_text()
        assert contents(tmp_path / "out") == contents(tmp_path / "expected"), log
        run(config)
        assert "20 thoughts in 2 parts" in capsys.readouterr().out and len(server.answered()) == 40
    script = (tmp_path / "slurm.log.script").read_text()
    assert "--partition=cpu" in script
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(b"sk-this-must" not in path.read_bytes() for path in [*files, tmp_path / "slurm.log"])
