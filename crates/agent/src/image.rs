//! Images in a pool: taken in from whoever uploads them or from another host, checked, read, removed.
//!
//! Bytes go into a file of their own beside their place, are counted and hashed on the way, and are looked at by a
//! parser and by `qemu-img` before the file gets its name. Whatever fails, and however the agent ends, nothing but
//! whole and checked parts is ever under a part's name; what is unfinished is removed at once, or at the next start.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use berth_api::agent::{PartQuery, StoredPart, VmDefinition};
use berth_model::image::{Image, ImagePart, PartFormat, PartRole};
use berth_model::name::Name;
use berth_model::{HostId, ImageId, Problem, ProblemCode};
use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError, blocking, remove_tree};
use crate::layout::{PoolDirs, VmRecord};
use crate::services::Services;

pub mod intake;

use intake::Intake;

/// What is known of an image in a pool: `image.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The parts that are there, each checked.
    pub parts: BTreeMap<PartRole, PartRecord>,
}

/// A part that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRecord {
    /// How it is laid out.
    pub format: PartFormat,
    /// The file's length in bytes.
    pub size_bytes: u64,
    /// Its SHA-256 in hexadecimal.
    pub sha256: String,
    /// The size that a guest sees, in bytes.
    pub virtual_size_bytes: u64,
}

/// What a part is to be, by its uploader's or its image's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// What it is for.
    pub role: PartRole,
    /// How it is laid out.
    pub format: PartFormat,
    /// The file's length in bytes.
    pub size_bytes: u64,
    /// Its SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

impl Expected {
    /// Reads an upload's query.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn from_query(role: PartRole, query: &PartQuery) -> Result<Self, Problem> {
        let format = match query.format.as_str() {
            "raw" => PartFormat::Raw,
            "qcow2" if role == PartRole::Disk => PartFormat::Qcow2,
            "qcow2" => return Err(Problem::field("format", "qcow2", format!("raw for a {}", role.as_str()))),
            other => return Err(Problem::field("format", other, "raw or qcow2")),
        };
        if query.size_bytes == 0 {
            return Err(Problem::field("size_bytes", 0, "the file's length in bytes"));
        }
        let sha256 = query.sha256.to_ascii_lowercase();
        if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Problem::field("sha256", &query.sha256, "64 hexadecimal digits"));
        }
        Ok(Self { role, format, size_bytes: query.size_bytes, sha256 })
    }

    /// What an image says of one of its parts.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn from_part(part: &ImagePart) -> Result<Self, Problem> {
        let (format, sha256) = (part.format.as_str().to_owned(), part.sha256.clone());
        Self::from_query(part.role, &PartQuery { format, size_bytes: part.size_bytes, sha256 })
    }
}

/// Bytes on their way, with the words of what broke them off.
pub type Chunks = futures_util::stream::BoxStream<'static, Result<bytes::Bytes, String>>;

/// The bytes of a body.
pub fn chunks<B>(body: B) -> Chunks
where
    B: hyper::body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: std::fmt::Display,
{
    use futures_util::{StreamExt, TryStreamExt};
    http_body_util::BodyExt::into_data_stream(body).map_err(|error| error.to_string()).boxed()
}

/// Who has an image.
#[derive(Debug, Clone, Copy)]
pub struct Holder<'a> {
    /// The host; this one, when it has it in another pool.
    pub host: &'a HostId,
    /// In which of its pools.
    pub pool: &'a Name,
    /// The host's address.
    pub address: &'a str,
}

/// One at a time changes an image's record.
#[derive(Debug, Default)]
pub struct Images {
    changing: tokio::sync::Mutex<()>,
}

impl Images {
    /// Takes a part in. A part that is there already with the same bytes is not read again.
    ///
    /// # Errors
    /// When the bytes are not what was expected, or there is no room; nothing of them is then left.
    pub async fn take(
        &self,
        services: &Services,
        pool: &PoolDirs,
        image: &ImageId,
        expected: &Expected,
        bytes: &mut Chunks,
    ) -> Result<StoredPart, Problem> {
        if let Some(part) = record(pool, image).await?.parts.get(&expected.role)
            && part.sha256 == expected.sha256
            && part.format == expected.format
        {
            return Ok(StoredPart { virtual_size_bytes: part.virtual_size_bytes });
        }
        let mut intake = Intake::begin(services, pool, image, expected).await?;
        intake.fill(bytes).await?;
        let virtual_size_bytes = intake.check(services).await?;
        let part = PartRecord {
            format: expected.format,
            size_bytes: expected.size_bytes,
            sha256: expected.sha256.clone(),
            virtual_size_bytes,
        };
        let _changing = self.changing.lock().await;
        intake.keep(part).await?;
        Ok(StoredPart { virtual_size_bytes })
    }

    /// Takes all parts of an image in from another host that has them.
    ///
    /// # Errors
    /// As [`Self::take`], and when the host can't be asked.
    pub async fn fetch(
        &self,
        services: &Services,
        task: &crate::task::TaskContext,
        image: &Image,
        pool: &Name,
        from: Holder<'_>,
    ) -> Result<(), Problem> {
        let dirs = services.layout.pool(pool)?;
        let client = services.peers.connect(from.host, from.address);
        for part in &image.parts {
            let expected = Expected::from_part(part)?;
            task.phase(&format!("fetching the {}", part.role.as_str()));
            let path = berth_api::agent::PoolImagePath {
                pool: from.pool.clone(),
                image: image.id.clone(),
                role: part.role,
            };
            if has_part(&dirs, image, part).await? {
                continue;
            }
            let response = client
                .download::<berth_api::agent::PeerImageDownload>(&path, &berth_api::endpoint::Nothing {})
                .await
                .map_err(berth_api::ClientError::into_problem)?;
            let mut bytes = chunks(response.into_body());
            task.unless_cancelled(self.take(services, &dirs, &image.id, &expected, &mut bytes)).await??;
        }
        Ok(())
    }

    /// Removes an image from a pool; nothing if it is not there.
    ///
    /// # Errors
    /// When a VM in the pool lies on it.
    pub async fn delete(&self, pool: PoolDirs, image: ImageId) -> Result<(), Problem> {
        let _changing = self.changing.lock().await;
        blocking(move || {
            if let Some(user) = user_of(&pool, &image)? {
                let message = format!("image {image} is still needed by {user}");
                return Err(Problem::new(ProblemCode::Protected, message));
            }
            remove_tree(&pool.image(&image))?;
            Ok(durable::sync_parent(&pool.image(&image))?)
        })
        .await
    }
}

/// What is known of an image in a pool.
///
/// # Errors
/// When the record can't be read.
pub async fn record(pool: &PoolDirs, image: &ImageId) -> Result<ImageRecord, Problem> {
    let path = pool.image_record(image);
    blocking(move || Ok(durable::read_json(&path)?.unwrap_or_default())).await
}

async fn has_part(pool: &PoolDirs, image: &Image, part: &ImagePart) -> Result<bool, Problem> {
    let record = record(pool, &image.id).await?;
    Ok(record.parts.get(&part.role).is_some_and(|found| found.sha256.eq_ignore_ascii_case(&part.sha256)))
}

/// Makes sure that all parts of an image are in a pool.
///
/// # Errors
/// The part that is not.
pub async fn check_present(pool: &PoolDirs, image: &Image) -> Result<(), Problem> {
    for part in &image.parts {
        if !has_part(pool, image, part).await? {
            let (role, name) = (part.role.as_str(), &pool.name);
            let message = format!("the {role} of image {} is not in pool '{name}' of this host", image.id);
            return Err(Problem::new(ProblemCode::WrongState, message));
        }
    }
    Ok(())
}

/// A VM in the pool that lies on this image, if there is one.
fn user_of(pool: &PoolDirs, image: &ImageId) -> Result<Option<String>, Problem> {
    let directory = pool.vms();
    let entries = fs::read_dir(&directory).map_err(FileError::io(&directory, "listed"))?;
    for entry in entries {
        let entry = entry.map_err(FileError::io(&directory, "listed"))?;
        let record: Option<VmRecord> = durable::read_json(&entry.path().join("vm.json"))?;
        if let Some(VmRecord { definition: VmDefinition { id, image: used, .. }, .. }) = record
            && used.id == *image
        {
            return Ok(Some(id.to_string()));
        }
    }
    Ok(None)
}

/// Removes what an agent of this host left unfinished in a pool.
///
/// # Errors
/// When the pool can't be listed.
pub fn clean(pool: &PoolDirs, host: &HostId) -> Result<(), FileError> {
    let directory = pool.images();
    for image in fs::read_dir(&directory).map_err(FileError::io(&directory, "listed"))? {
        let image = image.map_err(FileError::io(&directory, "listed"))?.path();
        let Ok(files) = fs::read_dir(&image) else { continue };
        for file in files.flatten() {
            if intake::is_of(&file.file_name(), host) {
                durable::remove_file(&file.path())?;
            }
        }
        // Fails when there is a part in it, which is what is wanted.
        let _ = fs::remove_dir(&image);
    }
    Ok(())
}

/// Lets everybody enter an image's directory: the parts in it are for all VMs.
fn open_directory(directory: &Path) -> Result<(), FileError> {
    fs::create_dir_all(directory).map_err(FileError::io(directory, "made"))?;
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(directory, mode).map_err(FileError::io(directory, "opened"))?;
    durable::sync_parent(directory)
}
