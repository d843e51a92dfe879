"""The tool in Python: what a command does, one line does here, with the same settings and the same files.

>>> import mirip_fast as mf
>>> works = mf.embed("data/")            # the frozen backbone looks at every image once
>>> model = mf.train(works)              # seconds
>>> print(model.evaluate())              # on works that it has not seen
>>> ranking = model.rank("folder/")      # a DataFrame, the best work first

Settings are named as the options are (``backbone="…"``, ``image_size=224``, ``folds=5``; None is ``auto``).
They stand above ``config=`` (a YAML file, or a mapping such as ``{"train": {"epochs": 20}}``), and that above
the ``mirip.yaml`` of the working folder. What is told on the way goes to the logger ``mirip_fast``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mirip_fast.config import PROJECT_FILE, Config
from mirip_fast.errors import ConfigError, DataError, RunNotFoundError
from mirip_fast.progress import Bar
from mirip_fast.settings import Resolved, resolve, settings

if TYPE_CHECKING:
    import pandas as pd

    from mirip_fast.evaluation.report import Report
    from mirip_fast.features.datasets import Dataset
    from mirip_fast.portfolio.explain import Explained
    from mirip_fast.ranking.score_model import ScoreModel

    #: A folder, CSV file, tar, pattern or address as the commands take it, or a DataFrame with a row per
    #: image and its file in a column ``file``, ``filename`` or ``image_path``, from the working folder on.
    Source: TypeAlias = str | os.PathLike[str] | pd.DataFrame

_FILE_COLUMNS = ("file", "filename", "image_path")
_COMMAND = "mirip_fast in Python"  # what is running, for whoever finds the store locked


@dataclass(frozen=True, repr=False)
class Works:
    """Embedded images, of :func:`embed`: a table, and the features of each.

    Attributes:
        dataset: the list of them in the cache.
    """

    dataset: Dataset

    @property
    def images(self) -> pd.DataFrame:
        """[n rows] every image that was given, in that order.

        Columns: ``image_id``, ``file``, ``sha256`` (hexadecimal), ``status`` (embedded, present, duplicate or
        failed), ``reason`` (why it failed), ``tier``, ``tier_score``, ``group``, and the further columns of
        the table that was given, as they came.
        """
        import pandas as pd

        from mirip_fast.data.table import or_none, own_columns

        table = self.dataset.images()
        known = ("image_id", "file", "sha256", "status", "reason", "tier", "tier_score", "group")
        hashes = [None if sha is None else sha.hex() for sha in table["sha256"]]
        return table[[*known, *own_columns(table)]].assign(
            sha256=pd.Series(hashes, dtype=object),
            tier=pd.Series(or_none(table["tier"]), dtype=object),
        )

    def features(self, kinds: str | None = None, *, view: int = 0) -> NDArray[np.float32]:
        """[n, D] features in the order of :attr:`images`; NaN in the rows of images that failed.

        Args:
            kinds: what to join, such as ``cls`` or ``cls_6+mean``; None: the CLS token and the mean of the
                patches, of the last layer.
            view: which of the stored views; 0 is the picture as it is.

        Raises:
            StoreError: the cache has no such features.
            ConfigError: there are not so many views.
        """
        from mirip_fast.features.store import FeatureStore
        from mirip_fast.ranking.rows import read_features

        views = self.dataset.views()
        if not 0 <= view < len(views):
            raise ConfigError(f"view={view}: there are {len(views)} views, and 0 is the first")
        images = self.images
        good = np.flatnonzero(images["status"] != "failed")
        hashes = [bytes.fromhex(images["sha256"].iloc[i]) for i in good]
        store = FeatureStore.open(self.dataset.store_path)
        rows = read_features(store, hashes, kinds or "cls+mean", [views[view]])[:, 0]
        result = np.full((len(images), rows.shape[1]), np.nan, np.float32)
        result[good] = rows
        return result

    def __len__(self) -> int:
        return int(self.dataset.info["images"])

    def __repr__(self) -> str:
        info = self.dataset.info
        return f"Works({info['source']!r}: {info['images']} images, {info['failed']} failed)"


@dataclass(frozen=True, repr=False)
class Model:
    """A trained model, of :func:`train` or :func:`load`: scores of works, and how far they can be trusted.

    Attributes:
        scorer: what turns features into scores.
        config: the settings that it was made or loaded with.
    """

    scorer: ScoreModel
    config: Config

    @property
    def path(self) -> Path:
        """The run, or the folder that it was loaded from."""
        return self.scorer.checkpoint.parent

    def rank(
        self,
        source: Source,
        *,
        tiers: bool = False,
        anyway: bool = False,
        out: str | os.PathLike[str] | None = None,
        html: str | os.PathLike[str] | None = None,
        xlsx: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Sort works by score, as `mirip-fast rank`.

        Args:
            source: what to sort; grades in it are not looked at.
            tiers: compare with graded works of every tier, too: columns ``wins_<tier>``.
            anyway: sort by a model that is no better than chance, too.
            out: write ranking.csv and ranking.json into this folder.
            html: write the page of the ranking to this file.
            xlsx: write the ranking with small pictures to this Excel workbook.
            options: settings by their names; ``by="applicant"`` ranks applicants (``portfolio="best:3"``,
                ``within="department"``).

        Returns:
            A row per readable work, the best first, with the columns of
            :func:`mirip_fast.portfolio.ranking.rank_scores`: rank and its 95 % interval, score (higher is
            better), 0–100, tier and its probabilities as far as they are known, file, image_id, and the
            columns of ``source``; with ``by`` also ``applicant``, ``applicant_rank``, its interval and
            ``applicant_score``. Its ``attrs``: ``applicants`` a dict per applicant, the best first;
            ``failures`` lists (file, reason) of works that could not be read, ``names`` all works in
            the order of ``source``, ``warnings`` what to know of the numbers.

        Raises:
            DataError: no image could be read, or the model is no better than chance.
        """
        from mirip_fast.portfolio.page import check_page_path, write_page
        from mirip_fast.portfolio.rank import rank_folder
        from mirip_fast.portfolio.ranking import applicant_records, check_applicants_path
        from mirip_fast.portfolio.xlsx import check_workbook_path, write_workbook
        from mirip_fast.ranking.anchors import find_anchors

        config = _settings(options, base=self.config).config
        if html is not None:
            check_page_path(Path(html))
        if xlsx is not None:
            check_workbook_path(Path(xlsx))
        if out is not None and config.data.by is not None:
            check_applicants_path(Path(out))
        anchors = None
        if tiers:
            anchors = find_anchors(self.scorer, Path(config.embed.cache_dir), None)
        with _given(source, config) as (where, config), Bar(" images") as bar:
            done = rank_folder(
                self.scorer,
                where,
                config,
                anchors=anchors,
                anyway=anyway,
                command=_COMMAND,
                progress=bar.embedding,
            )
        if out is not None:
            done.write(Path(out))
        if html is not None:
            write_page(Path(html), done, config)
        if xlsx is not None:
            pictures = [done.root / file for file in done.ranking["file"]]
            write_workbook(
                Path(xlsx), done.ranking, pictures, config,
                applicants=done.applicants, within=done.portfolio.get("within"),
            )  # fmt: skip
        ranking = done.ranking
        ranking.attrs["failures"] = done.failures
        ranking.attrs["names"] = done.names
        ranking.attrs["warnings"] = done.calibration.warnings()
        if done.applicants is not None:
            ranking.attrs["applicants"] = applicant_records(done.applicants)
            ranking.attrs["warnings"] += [done.portfolio["why"], *done.portfolio["remarks"]]
        return ranking

    def score(self, source: Source, **options: Any) -> pd.DataFrame:
        """As :meth:`rank`, in the order of ``source``; a work that cannot be read has a row of NaN."""
        ranking = self.rank(source, **options)
        table = ranking.set_index("file").reindex(ranking.attrs["names"])
        return table.reset_index().reindex(columns=[*ranking.columns])

    def evaluate(
        self, data: Source | None = None, *, split: str = "test", **options: Any
    ) -> Report:
        """How well the scores order graded works that the model has not seen, as `mirip-fast evaluate`.

        Args:
            data: graded works; None: a split of the run.
            split: with ``data=None``: train, val or test.
            options: settings by their names.

        Returns:
            A report: ``pairwise_accuracy`` and other figures with their intervals, ``agreement`` of several
            graders, and whether the model is ``better_than`` others; ``print`` shows all as the command does.

        Raises:
            DataError: there are no grades, or the run has no such split.
        """
        from mirip_fast.ranking.evaluate import evaluate_files, evaluate_split

        config = _settings(options, base=self.config).config
        if data is None:
            return evaluate_split(self.scorer, split, config, baselines=True).report
        with _given(data, config) as (where, config), Bar(" images") as bar:
            return evaluate_files(
                self.scorer, Path(where), None, config, None, bar.embedding, baselines=True
            ).report

    def explain(
        self, images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], **options: Any
    ) -> list[Explained]:
        """What in pictures raises and what lowers their scores, as `mirip-fast explain`; needs the backbone.

        Args:
            images: picture files.
            options: settings by their names.

        Returns:
            One per picture: ``.overlay()`` is the map over the picture (a PIL image), ``.map`` the numbers,
            ``.likes`` the graded works that it looks like (DataFrames).

        Raises:
            DataError: a picture cannot be read.
        """
        from mirip_fast.portfolio.explain import Explainer

        config = _settings(options, base=self.config).config
        paths = [images] if isinstance(images, str | os.PathLike) else list(images)
        explainer = Explainer(self.scorer, config, command=_COMMAND)
        failures: list[tuple[Path, str]] = []
        found = list(explainer.explain([Path(path) for path in paths], failures=failures))
        if failures:
            raise DataError("\n".join(f"{path}: {reason}" for path, reason in failures))
        return found

    def export(
        self,
        out: str | os.PathLike[str],
        *,
        onnx: bool = False,
        overwrite: bool = False,
        **options: Any,
    ) -> list[Path]:
        """Write the model as a folder to share, as `mirip-fast export`; :func:`load` takes it.

        Args:
            out: the folder.
            onnx: ONNX graphs beside the model, instead of settings and a model card.
            overwrite: replace the files of an earlier export.
            options: settings by their names.

        Returns:
            The files.

        Raises:
            ConfigError: ``out`` has such files already, or the extra ``onnx`` is not installed.
        """
        config = _settings(options, base=self.config).config
        if onnx:
            from mirip_fast.portfolio.export import export_onnx

            return export_onnx(self.scorer, Path(out), config, overwrite=overwrite)[0]
        from mirip_fast.portfolio.hub_folder import write_hub_folder

        cache_dir = Path(config.embed.cache_dir)
        return write_hub_folder(self.scorer, Path(out), cache_dir, overwrite=overwrite)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model with its card to the Hugging Face Hub, from where :func:`load` takes it.

        No picture, path or name of a graded work goes along.

        Args:
            repo_id: ``user/name``; made if there is none.
            private: of a repository that is made.
            token: of the account; None: the one that ``hf auth login`` keeps.

        Returns:
            Address of the upload.

        Raises:
            ConfigError: the Hub refuses; says why.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        with tempfile.TemporaryDirectory() as folder:
            self.export(Path(folder) / "model")
            try:
                api = HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                done = api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "model")
            except (HfHubHTTPError, HFValidationError) as error:
                raise ConfigError(f"{repo_id} cannot be uploaded: {error}") from error
        return str(done)

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r})"


def embed(
    source: Source,
    *,
    limit: int | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Works:
    """Compute the features of every image once, as `mirip-fast embed`; instant the second time.

    Args:
        source: the images, with their grades where there are some.
        limit: a trial of the first ``limit`` images.
        config: a YAML file, or a mapping of sections.
        options: settings by their names, such as ``backbone`` and ``image_size``.

    Raises:
        ConfigError: unknown or wrong settings.
        DataError: what is wrong with the table or the images.
        BackboneError: the backbone cannot be found.

    >>> works = mf.embed("data/", backbone="facebook/dinov2-large")
    >>> works.images.groupby("tier").size()
    >>> works.features("cls").shape
    (583, 1024)
    """
    from mirip_fast.features.phase_one import each_backbone, embed_data

    resolved = _settings(options, config)
    with _given(source, resolved.config, keep=True) as (where, given):
        passes = each_backbone(given)
        for number, each in enumerate(passes):
            with Bar(" images") as bar:
                done = embed_data(
                    where, each, limit=limit, command=_COMMAND, progress=bar.embedding,
                    backbones=[one.embed.backbone for one in passes],
                )  # fmt: skip
            if number == 0:
                first = done.dataset
    if first is None:
        raise RunNotFoundError(
            "One of several processes has embedded its share: the same call alone, after them, makes the list"
        )
    return Works(first)


def train(
    works: Works | Source | None = None,
    *,
    full: bool = False,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Model:
    """Learn to score, as `mirip-fast train`; the run is kept in a folder of ``runs/``.

    Args:
        works: embedded works with grades; other sources are embedded first; None: what was embedded last.
        full: train the backbone, too (`train --full`; starts from the newest run on these works).
        config: a YAML file, or a mapping of sections.
        options: settings by their names, such as ``folds``, ``readout`` and ``tiers``.

    Raises:
        ConfigError: unknown or wrong settings.
        DataError: there are no grades to learn from.

    >>> model = mf.train(works, tiers="gold,silver,bronze")
    """
    from mirip_fast.ranking.evaluate import pick_model

    resolved = _settings(options, config)
    made = resolved.config
    if works is not None and not isinstance(works, Works):
        names = {setting.name for setting in settings("embed", "data", "runtime")}
        own = {name: value for name, value in options.items() if name in names}
        works = embed(works, config=config, **own)
    data = None
    if works is not None:
        data = works.dataset.source
        made.embed.cache_dir = str(works.dataset.store_path.parent)
    if full:
        from mirip_fast.finetune.train import train_full

        run, _ = train_full(made, data, given=resolved.given)
    else:
        from mirip_fast.ranking.train import train_head

        grades = ("tiers", "tier_column", "score_column", "group_column", "by", "applicants")
        again = {name: getattr(made.data, name) for name in grades if name in options}
        served = "train.pairs" not in resolved.given
        run, _ = train_head(made, data, grades=again, served=served)
    return Model(pick_model(run.path, run.path.parent), made)


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Model:
    """A trained model: a run, an exported folder, a checkpoint, or ``user/name`` of the Hugging Face Hub.

    Args:
        path: where it is; None: the newest finished run.
        config: a YAML file, or a mapping of sections.
        options: settings by their names.

    Raises:
        RunNotFoundError: there is none.
        CheckpointError: it cannot be read.

    >>> model = mf.load("runs/20261128-194739-gp")
    """
    made = _settings(options, config).config
    if path is not None and not Path(path).exists() and str(path).count("/") == 1:
        path = _of_hub(str(path))
    from mirip_fast.ranking.evaluate import pick_model

    where = None if path is None else Path(path)
    return Model(pick_model(where, Path(made.train.output_dir)), made)


def _of_hub(repo_id: str) -> str:
    """The local copy of a model of the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(repo_id))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise RunNotFoundError(
            f"{repo_id} is no run and no folder here, and the Hub does not give it: {error}"
        ) from error


def _settings(
    options: Mapping[str, Any],
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    base: Config | None = None,
) -> Resolved:
    """Settings of the working folder or of ``base``, below those of ``config``, below the options."""
    known = {setting.name: setting.key for setting in settings()}
    given: dict[str, Any] = {}
    files: list[Path] = []
    if base is not None:
        given = {s.key: getattr(getattr(base, s.section), s.name) for s in settings()}
    elif Path(PROJECT_FILE).is_file():
        files.append(Path(PROJECT_FILE))
    if isinstance(config, str | os.PathLike):
        files.append(Path(config))
    for section, values in config.items() if isinstance(config, Mapping) else ():
        if not isinstance(values, Mapping):
            raise ConfigError(f"config={{{section!r}: …}}: a section is a mapping of its settings")
        given.update((f"{section}.{name}", value) for name, value in values.items())
    for name, option in options.items():
        value = os.fspath(option) if isinstance(option, os.PathLike) else option
        value = list(value) if isinstance(value, tuple) else value
        given[known.get(name, name)] = "auto" if value is None else value
    return resolve(tuple(files), given)


@contextlib.contextmanager
def _given(source: Source, config: Config, *, keep: bool = False) -> Iterator[tuple[str, Config]]:
    """What the library reads: a path as it is, a DataFrame as a CSV file, with the settings that go with it.

    Args:
        source: what was given.
        config: the settings.
        keep: whether the file stays, in the cache under its content's hash, so that the same frame is the
            same data set again.
    """
    if isinstance(source, str | os.PathLike):
        yield os.fspath(source), config
        return
    column = config.data.image_column
    column = column or next((name for name in _FILE_COLUMNS if name in source), None)
    if column is None or column not in source:
        raise DataError(
            f"A DataFrame of works has their files in a column {column or ', '.join(_FILE_COLUMNS)}; "
            f"this one has {', '.join(map(str, source.columns)) or 'no columns'}"
        )
    if source.empty:
        raise DataError("The DataFrame has no rows")
    table = source.copy()
    table[column] = [str(Path(str(file)).expanduser().absolute()) for file in table[column]]
    text = table.to_csv(index=False)
    name = f"{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.csv"
    data = dataclasses.replace(
        config.data, image_column=column, separator=",", encoding="utf-8", sheet=None,
        image_root=os.path.commonpath([str(Path(file).parent) for file in table[column]]),
    )  # fmt: skip
    folder = Path(config.embed.cache_dir) / "tables" if keep else Path(tempfile.mkdtemp())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        yield str(path), dataclasses.replace(config, data=data)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
