"""Operations of a traced graph, by what they do to channels."""

from __future__ import annotations

from torch import fx, nn

from vardrop.sparsity.channels import Rule
from vardrop.sparsity.facts import Unknown, name_of
from vardrop.sparsity.function_rules import FunctionRules
from vardrop.sparsity.module_rules import ModuleRules


class Reader(ModuleRules, FunctionRules):
    """Makes the rule of every node of a graph, in order.

    Args:
        graph: a traced module's, with ``meta["shape"]`` for the tensors.
        modules: by path.
        fixed: path -> reason, for modules that must stay as they are.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], fixed: dict[str, str]) -> None:
        super().__init__(modules, fixed)
        self.rules: list[Rule] = []
        for node in graph.nodes:
            self._read(node)

    def _read(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            return
        try:
            rule = self._rule(node)
        except Unknown as reason:
            what = "they are outputs of the network" if node.op == "output" else f"{self._shown(node)} {reason}"
            rule = Rule(node, [self.facts[each] for each in node.all_input_nodes if each in self.facts], what)
        self.rules.append(rule)
        if rule.out is not None:
            self.facts[node] = rule.out

    def _shown(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
        return f"{name_of(node)}()"

    def _rule(self, node: fx.Node) -> Rule:
        if node.op == "output":
            raise Unknown("")
        if node.op == "call_module":
            return self._module(node, self.modules[str(node.target)])
        return self._function(node)
