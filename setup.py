"""What pyproject.toml cannot say: params, sites, job templates and tasks of the repository's top folders are in the wheel too.

They are copied to `megatron_cpt/shipped/` of the build. In a checkout (an editable install too) there is no such folder, and the
top folders themselves are read.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("params/*.yaml", "pbs/job.sh.in", "pbs/sites/*.yaml", "slurm/job.sh.in", "slurm/sites/*.yaml")
SHIPPED += ("tasks/*/task.yaml", "tasks/*/params/*.yaml")


class BuildWithShipped(build_py):
    """Builds the package and puts the shipped files into it."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        for pattern in SHIPPED:
            for source in sorted(root.glob(pattern)):
                target = Path(self.build_lib) / "megatron_cpt" / "shipped" / source.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithShipped})
