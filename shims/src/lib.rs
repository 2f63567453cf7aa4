//! `kvstore._native`: the Python package's extension module. Thin: everything that is not Python is the Rust client's.

mod buffer;
mod client;
mod errors;
mod leases;
mod pages;
mod runtime;

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
    errors::add(module)
}
