"""Numbers to what people and programs read: labelled results, tables, pictures, files, the record of the run.

Takes numpy arrays; knows no torch and no model. pandas, xarray, matplotlib and rich are loaded where needed.
"""

from patchc.ir.check import Check
from patchc.report.expects import failed_expects
from patchc.report.record import run_record
from patchc.report.results import Result, Results

__all__ = ["Check", "Result", "Results", "failed_expects", "run_record"]
