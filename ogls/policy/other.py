"""Another model reads views for the student, with a trunk and a head of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ogls.loss.chunked import Head
from ogls.policy.policy import Policy
from ogls.policy.pretrained import describe_model, load_tokenizer, vocab_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Other(Policy):
    """This model reads token ids as a policy does, and nothing in it is trained.

    Its weights are held in the policy's dtype. Of its head, the rows are used that the student's has, too: models of
    one family have heads of different lengths, and the rows that no token has are padding.

    Args:
        student: policy whose rollouts it reads
        model: name of the embedded model, folder, or Hub id
        adapter: folder of a peft adapter that is merged into the model; None merges none
    """

    def __init__(self, student: Policy, model: str, adapter: str | None = None) -> None:
        super().__init__(model, adapter, lora=None, dtype=student.dtype, gradient_checkpointing=False)
        self._autocast = False
        self._student = (student,)  # in a tuple, so that it is no part of this module

    def check(self) -> None:
        """Looks at vocabularies, before any weights are fetched or read.

        Raises:
            ValueError: the two models have different tokens, or this one's head has no room for the student's ids.
        """
        (student,) = self._student
        folder = describe_model(self.name)
        own, wanted = load_tokenizer(folder).get_vocab(), student.tokenizer.get_vocab()
        if odd := [token for token in wanted | own if own.get(token) != wanted.get(token)]:
            first = min(odd, key=lambda token: (wanted.get(token, len(wanted)), token))
            raise ValueError(
                f"method.teacher.model {self.name} has another tokenizer than policy.model {student.name}: {len(odd)} "
                f"tokens differ, such as {first!r} with the id {own.get(first)} there and {wanted.get(first)} here; a "
                "teacher has to read the student's own tokens: take one of the same family"
            )
        rows, needed = vocab_size(folder), vocab_size(student.folder)
        if rows < needed:
            raise ValueError(
                f"method.teacher.model {self.name} has {rows} logits and policy.model {student.name} {needed}: the "
                "student could sample ids that its teacher lacks; take a teacher with as many logits or more"
            )

    def load(self, mesh: DeviceMesh | None = None) -> Other:
        """Checks the vocabularies and reads the weights at the first call, see `Policy.load`; returns the model."""
        if "model" not in self._modules:
            self.check()
            super().load(mesh)
        return self

    def take(self, model: Any) -> None:
        """Makes a reader of a model of transformers: all of it is frozen."""
        super().take(model)
        model.requires_grad_(False)

    def _noted(self, error: Exception) -> bool:
        """Has the student remember that memory ran out: its pass comes next, before which all processes ask."""
        return self._student[0]._noted(error)

    @property
    def head(self) -> Head:
        """Returns weight and bias of the rows of the output head that the student's vocabulary has."""
        weight, bias = super().head
        rows = vocab_size(self._student[0].folder)
        return weight[:rows], None if bias is None else bias[:rows]

    @property
    def lent_head(self) -> Head:
        """Returns the head of its states, which is never the student's."""
        return self.head
