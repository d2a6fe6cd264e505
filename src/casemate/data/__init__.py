"""Where bytes come from, and how they are cut into batches. No torch but in `device` and `official`."""

from casemate.data.base import Dataset, Images, Loaded, build_dataset, fetch_dataset, load_dataset

__all__ = ["Dataset", "Images", "Loaded", "build_dataset", "fetch_dataset", "load_dataset"]
