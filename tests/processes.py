"Where tests start processes: from a server that has the heavy imports behind it, so that they are paid once."
import multiprocessing

PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(['blockem.finetune', 'peft', 'transformers.models.llama.modeling_llama', 'jsonschema'])
