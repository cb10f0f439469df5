"""Faster ways to run the updates of a Trainer, compared with the plain ones before they are used."""
import torch

import parallel

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the norm of the metrics and of the gradient; bfloat16 rounds to 0.4%
WARM_UPS = 3  # before a capture, so that libraries have chosen their algorithms and reserved their memory


class CapturedUpdate:
    """An update as one CUDA graph: a replay launches its hundreds of kernels at once, and launches bind small batches.

    Args:
        update: takes tensors, reads nothing from the device, returns a dict of scalars. It is run to warm up.
        arguments: tensors like those it will be called with.
    """

    def __init__(self, update, arguments):
        self.arguments = [argument.clone() for argument in arguments]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                update(*self.arguments)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            metrics = update(*self.arguments)
            self.names, self.values = list(metrics), torch.stack(list(metrics.values()))

    def __call__(self, *arguments):
        for static, argument in zip(self.arguments, arguments, strict=True):
            static.copy_(argument, non_blocking=True)
        self.graph.replay()
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))


def accelerate(trainer, batches, *, compiled, capture, report):
    """Compiles the losses of a Trainer and captures its updates; undoes both where the results differ, or cannot be had.

    Args:
        trainer: keeps the state it has.
        batches: "critic" and "generator", to the arguments to try each update on.
        compiled: whether to use torch.compile.
        capture: CapturedUpdate, or None for no capture.
        report: called with a line of text if the plain updates are kept.
    """
    saved = [tensor.clone() for tensor in trainer.tensors()]

    def restore():
        for tensor, before in zip(trainer.tensors(), saved, strict=True):
            tensor.copy_(before)

    def results():
        restore()
        metrics = [getattr(trainer, f"{name}_update")(*arguments) for name, arguments in batches.items()]
        return [torch.stack(list(found.values())) for found in metrics] + trainer.gradients()

    plain = results()
    try:
        for name, arguments in batches.items():
            if compiled:
                setattr(trainer, f"{name}_losses", torch.compile(getattr(trainer, f"{name}_losses")))
            if capture:
                setattr(trainer, f"{name}_update", capture(getattr(trainer, f"{name}_update"), arguments))
        difference = torch.stack([torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
                                  for found, expected in zip(results(), plain, strict=True)]).max().item()
        # Written so that NaN fails too.
        fault = None if difference <= TOLERANCE[trainer.config.precision] else f"its results differ by {difference:.1%}"
    except Exception as error:  # no compiler, no memory, an operation that cannot be captured: whatever the backend raises
        if parallel.world_size() > 1:
            raise  # the others have not failed, and would wait for this one
        while error.__context__:  # the end of a failed capture raises again
            error = error.__context__
        fault = " ".join(str(error).split())[:200] or type(error).__name__
    restore()
    if fault:
        for name in batches:
            vars(trainer).pop(f"{name}_losses", None)
            vars(trainer).pop(f"{name}_update", None)
        report(f"warning: training goes on without --compile: {fault}")
