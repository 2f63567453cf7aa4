//! `kvstore._native`: the Python package's extension module. Thin: everything that is not Python is the Rust client's, or the checkpoint crate's.

mod buffer;
mod client;
mod contents;
mod errors;
mod exported;
mod heap;
mod leases;
mod near;
mod pages;
mod restored;
mod runtime;
mod sessions;
mod snapshots;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<client::Client>()?;
    module.add_class::<client::Group>()?;
    module.add_class::<leases::Leases>()?;
    module.add_class::<leases::LeaseWindows>()?;
    module.add_class::<pages::Pages>()?;
    module.add_class::<pages::PagesLoad>()?;
    module.add_class::<restored::Restored>()?;
    module.add_class::<sessions::Sessions>()?;
    module.add_class::<sessions::SessionWriter>()?;
    module.add_class::<sessions::Started>()?;
    module.add_class::<snapshots::Progress>()?;
    module.add_class::<snapshots::Snapshots>()?;
    module.add_function(wrap_pyfunction!(restored::cache_ls, module)?)?;
    module.add_function(wrap_pyfunction!(restored::cache_rm, module)?)?;
    errors::add(module)
}
