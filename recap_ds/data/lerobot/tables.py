"""Parquet columns as numpy arrays, with every way they can be wrong told in one line.

N = rows. LeRobot stores a feature of shape [D] as a list column and one of shape [1] as a plain value; both come back
as [N, D]. This file knows nothing of episodes.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recap_ds.errors import UsageError


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    # ValueError: text that is no text, among the names of columns.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as parquet ({one_line(error)}); copy the file again") from error


def read_table(path: Path, columns: list[str], row_group: int | None = None) -> pa.Table:
    """Read the named columns, all of which must be there, of the whole file or of one row group."""
    file = open_parquet(path)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise UsageError(f"{path}: has no column {', '.join(missing)}; copy or convert the data set again")
    try:
        return file.read(columns=columns) if row_group is None else file.read_row_group(row_group, columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path}: damaged ({one_line(error)}); copy the file again") from error


def column_to_numpy(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """[N, D] array of a numeric or bool column; D is 1 where the column holds plain values."""
    column = table.column(name).combine_chunks()
    num_rows, width, num_nulls = len(column), 1, column.null_count
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = column.drop_null().value_lengths().to_numpy(zero_copy_only=False)
        if len(lengths) and lengths.min() != lengths.max():
            raise UsageError(f"{path}: column {name} has rows of {lengths.min()} and of {lengths.max()} numbers")
        width = int(lengths[0]) if len(lengths) else 1
        column = column.flatten()
        num_nulls += column.null_count
    if num_nulls:
        raise UsageError(f"{path}: column {name} has {num_nulls} empty values; fill or drop them before importing")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise UsageError(f"{path}: column {name} holds {column.type}, not numbers or lists of numbers")
    return column.to_numpy(zero_copy_only=False).reshape(num_rows, width)


def as_flags(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """[N] bool of a flag column, which some recorders store as 0 and 1."""
    if values.shape[1] != 1 or not np.isin(values, (0, 1)).all():
        raise UsageError(f"{path}: column {name} is a flag and must hold one true or false (or 1 or 0) per row")
    return values[:, 0].astype(bool)


def one_line(error: Exception) -> str:
    """First line of a library's message: theirs may run over several."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
