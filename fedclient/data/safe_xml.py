"""XML from strangers as a plain tree: no DOCTYPE, so no entities and no bombs; no namespaces, no deep nesting."""

from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, TreeBuilder

from fedclient.data.labels import refused

MAX_BYTES = 64 * 1024**2  # the largest file of LIDC has 3 MB
MAX_DEPTH = 32  # LIDC has 6


def read_xml(path: Path, what: str) -> Element:
    """The root of an XML file, its tags without namespaces.

    Raises:
        ImageUnreadable: LABEL_UNREADABLE, a file that is broken, too large, too deep, or declares a document type.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise refused("LABEL_UNREADABLE", f"{what}: more than {MAX_BYTES} bytes. Split it.")
        parser = ElementTree.XMLParser(target=_Plain(what))  # noqa: S314 - what is dangerous in it ends at the DOCTYPE
        parser.feed(content)
        root: Element = parser.close()
        return root
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as e:  # their messages quote the file
        raise refused(
            "LABEL_UNREADABLE", f"{what}: the file is no XML, or broken ({type(e).__name__}). Copy it again."
        ) from None


class _Plain:
    """What the parser tells of the file as it reads: expat calls `doctype` before it looks at any entity."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tree = TreeBuilder()
        self._depth = 0

    def start(self, tag: str, attributes: dict[str, str]) -> Element:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise refused("LABEL_UNREADABLE", f"{self._what}: elements nest deeper than {MAX_DEPTH}. Export it again.")
        return self._tree.start(tag.rpartition("}")[2], attributes)

    def end(self, tag: str) -> Element:
        self._depth -= 1
        return self._tree.end(tag.rpartition("}")[2])

    def data(self, text: str) -> None:
        self._tree.data(text)

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise refused(
            "LABEL_UNREADABLE", f"{self._what}: it declares a document type, which may hide a bomb. Remove the DOCTYPE."
        )

    def close(self) -> Element:
        return self._tree.close()
