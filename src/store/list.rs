//! Several stores, asked in order.

use std::sync::Arc;

use super::error::{SetupError, StoreError};
use super::spec::{StoreSpec, open_store};
use super::{Blob, SourceMode, Store};
use crate::key::Key;

/// An ordered list of stores, itself a store: the first that has a blob gives it.
#[derive(Debug)]
pub struct Stores {
    name: String,
    stores: Vec<Arc<dyn Store>>,
}

impl Stores {
    /// A list of open stores.
    #[must_use]
    pub fn new(stores: Vec<Arc<dyn Store>>) -> Self {
        let names: Vec<&str> = stores.iter().map(|store| store.name()).collect();
        Self { name: names.join(", "), stores }
    }

    /// Opens all stores of a list of settings.
    ///
    /// # Errors
    /// Of the first store that cannot be used; see [`open_store`].
    pub fn from_specs(specs: &[StoreSpec], mode: SourceMode) -> Result<Self, SetupError> {
        let stores: Result<Vec<_>, _> = specs.iter().map(|spec| open_store(spec, mode)).collect();
        stores.map(Self::new)
    }
}

impl Store for Stores {
    fn name(&self) -> &str {
        &self.name
    }

    /// A store that fails does not hide the ones after it: its error is returned only if none of them has
    /// the blob. Of several errors a transient one is returned, because then the blob may still be found.
    fn open(&self, key: &Key) -> Result<Option<Arc<dyn Blob>>, StoreError> {
        let mut kept: Option<StoreError> = None;
        for store in &self.stores {
            match store.open(key) {
                Ok(Some(blob)) => return Ok(Some(blob)),
                Ok(None) => {}
                Err(error) => {
                    let better = match &kept {
                        None => true,
                        Some(kept) => error.is_transient() && !kept.is_transient(),
                    };
                    if better {
                        kept = Some(error);
                    }
                }
            }
        }
        kept.map_or(Ok(None), Err)
    }
}
