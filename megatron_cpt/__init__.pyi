from megatron_cpt.interface.models import convert as convert
from megatron_cpt.interface.models import evaluate as evaluate
from megatron_cpt.interface.models import generate as generate
from megatron_cpt.interface.models import soup as soup
from megatron_cpt.interface.runs import run as run
from megatron_cpt.interface.tasks import config as config
from megatron_cpt.interface.tasks import init as init
from megatron_cpt.interface.tasks import plan as plan
from megatron_cpt.interface.tasks import train as train
from megatron_cpt.interface.texts import dedup as dedup
from megatron_cpt.interface.texts import shard as shard
from megatron_cpt.interface.texts import tokenize as tokenize

__version__: str
