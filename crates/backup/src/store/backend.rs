//! restic's layout on a [`Store`], for the library.
//!
//! The library's errors are texts. So the last thing that a place refused is kept here, and told instead of what the library
//! made of it.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use rustic_core::{BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend};

use super::{Store, StoreError};

/// How often something that failed is tried again. Less: a link that is cut for a moment costs the whole backup. More: one
/// that is gone is noticed late.
const TRIES: u32 = 4;
/// How long the first pause between two tries is; each is twice the one before.
const PAUSE: Duration = Duration::from_millis(500);

/// A place as the library sees it.
pub(crate) struct Backend {
    store: Box<dyn Store>,
    refused: Mutex<Option<StoreError>>,
}

impl Backend {
    pub(crate) fn new(store: Box<dyn Store>) -> Arc<Self> {
        Arc::new(Self { store, refused: Mutex::new(None) })
    }

    pub(crate) fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// What the place refused last, once.
    pub(crate) fn take_refusal(&self) -> Option<StoreError> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Tries a few times, but not what can't become better.
    fn trying<T>(&self, call: impl Fn(&dyn Store) -> Result<T, StoreError>) -> RusticResult<T> {
        let mut pause = PAUSE;
        for tried in 1.. {
            match call(&*self.store) {
                Ok(value) => return Ok(value),
                Err(StoreError::Failed { .. }) if tried < TRIES => {
                    thread::sleep(pause);
                    pause *= 2;
                }
                Err(error) => {
                    let message = error.to_string();
                    *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Err(RusticError::new(ErrorKind::Backend, message));
                }
            }
        }
        unreachable!("the last try returns")
    }
}

fn path(kind: FileType, id: &Id) -> String {
    let hex = id.to_hex();
    match kind {
        FileType::Config => "config".to_owned(),
        FileType::Pack => format!("data/{}/{}", &hex[..2], &hex[..]),
        FileType::Index | FileType::Key | FileType::Snapshot => format!("{}/{}", kind.dirname(), &hex[..]),
    }
}

impl ReadBackend for Backend {
    fn location(&self) -> String {
        self.store.place().to_owned()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(Id, u32)>> {
        let length_of = |length: u64| u32::try_from(length).unwrap_or(u32::MAX);
        if kind == FileType::Config {
            let length = self.trying(|store| store.length("config"))?;
            return Ok(length.map(|length| (Id::default(), length_of(length))).into_iter().collect());
        }
        let files = self.trying(|store| store.list(kind.dirname()))?;
        let parsed =
            files.into_iter().filter_map(|(name, length)| Some((name.parse().ok()?, length_of(length))));
        Ok(parsed.collect())
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<Bytes> {
        self.trying(|store| store.read(&path(kind, id), None))
    }

    fn read_partial(
        &self,
        kind: FileType,
        id: &Id,
        _: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        let range = u64::from(offset)..u64::from(offset) + u64::from(length);
        self.trying(|store| store.read(&path(kind, id), Some(range.clone())))
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        path(kind, id)
    }
}

impl WriteBackend for Backend {
    fn create(&self) -> RusticResult<()> {
        self.trying(|store| store.create())
    }

    fn write_bytes(&self, kind: FileType, id: &Id, _: bool, content: BytesList) -> RusticResult<()> {
        self.trying(|store| store.write(&path(kind, id), content.slice()))
    }

    fn remove(&self, kind: FileType, id: &Id, _: bool) -> RusticResult<()> {
        self.trying(|store| store.remove(&path(kind, id)))
    }
}
