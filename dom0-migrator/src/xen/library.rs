//! Loading a library and looking up functions in it.

use libloading::os::unix::{Library as Loaded, RTLD_GLOBAL, RTLD_NOW};

/// A loaded library. Its functions are called through pointers that were copied out of it, so it stays loaded until the
/// process ends.
#[derive(Debug)]
pub struct Library {
    name: String,
    loaded: &'static Loaded,
}

/// Why a library or a function is not there.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// The library could not be loaded.
    #[error(
        "cannot load {name}: {source}; install the package of Xen's toolstack libraries for the running release"
    )]
    Load {
        /// File name.
        name: String,
        /// What the dynamic linker said.
        source: libloading::Error,
    },
    /// The library has no such function.
    #[error("{name} has no {symbol}: {source}")]
    Symbol {
        /// File name.
        name: String,
        /// The function.
        symbol: &'static str,
        /// What the dynamic linker said.
        source: libloading::Error,
    },
}

impl Library {
    /// Loads a library by its file name.
    ///
    /// # Errors
    /// [`LibraryError::Load`] when it is not installed.
    pub fn load(name: &str) -> Result<Self, LibraryError> {
        // SAFETY: Xen's libraries have no initialisers beyond setting up their own data.
        let loaded = unsafe { Loaded::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }
            .map_err(|source| LibraryError::Load { name: name.to_owned(), source })?;
        Ok(Self { name: name.to_owned(), loaded: Box::leak(Box::new(loaded)) })
    }

    /// Looks up a function.
    ///
    /// # Errors
    /// [`LibraryError::Symbol`] when there is none of that name.
    ///
    /// # Safety
    /// `F` must be a function pointer type with the very signature that the library's header gives.
    pub unsafe fn function<F: Copy>(&self, symbol: &'static str) -> Result<F, LibraryError> {
        // SAFETY: the caller vouches for the type; the library is never unloaded, so the pointer stays valid.
        unsafe { self.loaded.get::<F>(symbol) }.map(|found| *found).map_err(|source| LibraryError::Symbol {
            name: self.name.clone(),
            symbol,
            source,
        })
    }
}
