# Thin names; every command here can be typed by hand (see README.md).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export LC_ALL := C.UTF-8
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
# Byte code is what makes the second run quick.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: sandbox test lint unit client monitoring haproxy molecule drift more drill check-airgap bundle clean bootstrap bench-rerun bench-failover check-gpu-install score-memory lock-controller

sandbox: bootstrap       ## container host, two real vLLM CPU engines, failover drill
	ansible-playbook playbooks/sandbox.yml

test: lint unit client monitoring haproxy molecule check-airgap ## everything that CI runs

lint: bootstrap
	tools/lint

unit: bootstrap
	pytest -q -n auto tests/unit

client: bootstrap        ## the reference client, beside servers that misbehave
	pytest -q client/tests

monitoring: bootstrap    ## alert rules and configurations, by promtool and amtool
	pytest -q tests/monitoring

haproxy: bootstrap       ## the gateway's configuration in a real HAProxy
	pytest -q tests/haproxy

drift: bootstrap         ## an admin tampers with real engines, and the drift check tells
	tools/molecule test drift

more: bootstrap          ## what takes longer on real engines
	tools/molecule test more

drill: bootstrap         ## failover in full: 500 requests for each fault, and a burst of long ones
	tools/molecule test drill

molecule: bootstrap
	tools/molecule test

check-airgap: bootstrap  ## a bundle, deployed into a container that has no network
	ansible-playbook playbooks/check_airgap.yml

INVENTORY ?= inventory/sandbox
bundle: bootstrap        ## all that the hosts of INVENTORY need, in one directory
	ansible-playbook -i $(INVENTORY) playbooks/bundle.yml

bench-rerun: bootstrap   ## tasks and seconds of a run that changes nothing, beside as many pings
	tools/bench_rerun.py

bench-failover: bootstrap ## what users lose through this gateway and through other doors, into docs (about 40 minutes)
	ansible-playbook -i $(INVENTORY) playbooks/bench_failover.yml

check-gpu-install: bootstrap ## the CUDA lock, installed for real into a container (several GB)
	ansible-playbook playbooks/check_gpu_install.yml

score-memory: bootstrap  ## the memory plan beside published starts: CASES=cases.jsonl [MODELS=models.json]
	tools/score_memory $(CASES) $(if $(MODELS),--models $(MODELS))

lock-controller: bootstrap
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
	  --fork-strategy requires-python --custom-compile-command "make lock-controller" \
	  requirements/controller.in -o requirements/controller.txt

clean: bootstrap         ## removes the sandbox, its image and all caches of this clone
	ansible-playbook playbooks/sandbox_destroy.yml -e sandbox_remove_image=true
	rm -rf .sandbox .venv .ansible .mypy_cache .pytest_cache .ruff_cache

bootstrap:
	@tools/bootstrap
