//! `berth image import`: bring an image in from files of this machine.
//!
//! Each file is read twice: once for its checksum, which is declared before the first byte is sent (and compared with
//! the one that the user has from the publisher), and once for the upload. The manager checks what arrives against
//! what was declared, so a file that changes in between is refused, not kept.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use berth_api::endpoint::Nothing;
use berth_api::manager::{CreateImage, ImageCreate, ImageDelete, ImagePartPath, ImagePartUpload, ImagePath};
use berth_api::transport;
use berth_model::access::Action;
use berth_model::image::{Image, ImagePart, PartFormat, PartRole};
use berth_model::name::Name;
use berth_model::operation::Progress;
use berth_model::{Problem, ProblemCode};
use bytes::Bytes;
use clap::Args;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;

use crate::arguments::DryRunArguments;
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::output::Format;
use crate::progress::Reporter;
use crate::session::Session;
use crate::units;

/// How much is read at once. Smaller costs system calls, larger makes the bar jump.
const CHUNK_BYTES: usize = 256 * 1024;
/// How often the bar is told how far the upload is.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);
const SHA256_HEX_CHARS: usize = 64;

/// What to bring in.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").args(["disk", "kernel"]).required(true).multiple(true))]
pub struct Arguments {
    /// The disk's file
    #[arg(value_name = "FILE", requires = "format")]
    disk: Option<PathBuf>,
    /// The image's name
    #[arg(long, value_parser = parse_name)]
    name: Name,
    /// The disk's format: always stated, never guessed
    #[arg(long, value_enum, requires = "disk")]
    format: Option<DiskFormat>,
    /// The disk's SHA-256 in hexadecimal, as its publisher states it: compared before anything is sent
    #[arg(long, value_name = "HEX", value_parser = parse_sha256, requires = "disk")]
    sha256: Option<String>,
    /// A Linux kernel to start directly, without a boot loader
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk that goes with the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    append: Option<String>,
    /// The segment whose VMs may use it; all without it
    #[arg(long)]
    segment: Option<String>,
    /// The pool to put it in [default: default]
    #[arg(long, value_parser = parse_name)]
    pool: Option<Name>,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// The formats that a disk may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DiskFormat {
    /// QEMU's copy-on-write format.
    Qcow2,
    /// The bytes are the content.
    Raw,
}

impl From<DiskFormat> for PartFormat {
    fn from(format: DiskFormat) -> Self {
        match format {
            DiskFormat::Qcow2 => Self::Qcow2,
            DiskFormat::Raw => Self::Raw,
        }
    }
}

fn parse_sha256(text: &str) -> Result<String, String> {
    if text.len() == SHA256_HEX_CHARS && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(format!("expected {SHA256_HEX_CHARS} hexadecimal digits"))
    }
}

/// What programs are told at the end.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    /// The image is there.
    Done { image: &'a Image },
}

/// A file and what it is declared as.
struct Source {
    path: PathBuf,
    part: ImagePart,
}

/// Brings it in. On failure, and after Ctrl-C, nothing of it is left.
///
/// # Errors
/// A file that can't be read or is not what its checksum says; what the manager refuses.
pub async fn run(session: &Session, arguments: Arguments) -> Result<(), Failure> {
    let mut reporter = Reporter::new(&session.output);
    let sources = sources(&arguments, &mut reporter)?;
    if arguments.dry_run.dry_run {
        reporter.finish();
        let size = units::bytes(sources.iter().map(|source| source.part.size_bytes).sum());
        let summary = format!("would bring in image {} ({size})", arguments.name);
        return session.would(Action::ImageImport, arguments.segment.as_deref(), &summary).await;
    }
    let wish = CreateImage {
        name: arguments.name,
        segment: arguments.segment,
        parts: sources.iter().map(|source| source.part.clone()).collect(),
        kernel_command_line: arguments.append.unwrap_or_default(),
        pool: arguments.pool,
    };
    let declared = session.send::<ImageCreate>(&Nothing {}, &Nothing {}, &wish).await?;
    let uploading = upload_all(session, &declared, &sources, &mut reporter);
    let image = match session.unless_interrupted("stopped; nothing of the image is kept", uploading).await {
        Ok(image) => image,
        Err(failure) => {
            // The failure is what the user must hear; that the rest could not be removed shows in the image's state.
            let path = ImagePath { image: declared.id.to_string() };
            let _ = session.ask::<ImageDelete>(&path, &Nothing {}).await;
            return Err(failure);
        }
    };
    reporter.finish();
    match session.output.format() {
        Format::Json => session.output.event(&Event::Done { image: &image }),
        Format::Table | Format::Yaml => session.output.done(&image, || {
            let size = units::bytes(image.parts.iter().map(|part| part.size_bytes).sum());
            format!("image {} is there ({size})", image.name)
        }),
    }
}

fn sources(arguments: &Arguments, reporter: &mut Reporter) -> Result<Vec<Source>, Failure> {
    let disk_format = arguments.format.map_or(PartFormat::Raw, PartFormat::from);
    let files = [
        (PartRole::Disk, disk_format, &arguments.disk, arguments.sha256.as_deref()),
        (PartRole::Kernel, PartFormat::Raw, &arguments.kernel, None),
        (PartRole::Initrd, PartFormat::Raw, &arguments.initrd, None),
    ];
    let mut sources = Vec::new();
    for (role, format, path, expected) in files {
        let Some(path) = path else { continue };
        let (size_bytes, sha256) = checksum(role, path, reporter)?;
        if let Some(expected) = expected.filter(|expected| *expected != sha256) {
            let message =
                format!("{} is not the file that was expected: its SHA-256 is {sha256}", path.display());
            return Err(Problem::new(ProblemCode::BadImage, message).at("sha256", sha256, expected).into());
        }
        let part = ImagePart { role, format, size_bytes, sha256, virtual_size_bytes: None };
        sources.push(Source { path: path.clone(), part });
    }
    Ok(sources)
}

fn checksum(role: PartRole, path: &Path, reporter: &mut Reporter) -> Result<(u64, String), Failure> {
    let unreadable = |error: io::Error| {
        Failure::field(role.as_str(), path.display(), &format!("a file that can be read ({error})"))
    };
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(Failure::field(role.as_str(), path.display(), "a regular file that is not empty"));
    }
    let mut meter = Meter::new(format!("checksum {}", role.as_str()), metadata.len());
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut done_bytes = 0;
    loop {
        match file.read(&mut buffer).map_err(unreadable)? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                done_bytes += read as u64;
                reporter.transfer(&path.display().to_string(), &meter.at(done_bytes))?;
            }
        }
    }
    let hexadecimal = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((done_bytes, hexadecimal))
}

async fn upload_all(
    session: &Session,
    declared: &Image,
    sources: &[Source],
    reporter: &mut Reporter,
) -> Result<Image, Failure> {
    let mut image = declared.clone();
    for source in sources {
        image = upload(session, declared, source, reporter).await?;
    }
    Ok(image)
}

async fn upload(
    session: &Session,
    declared: &Image,
    source: &Source,
    reporter: &mut Reporter,
) -> Result<Image, Failure> {
    let ImagePart { role, size_bytes, .. } = source.part;
    let file = tokio::fs::File::open(&source.path)
        .await
        .with_context(|| format!("{} can't be opened any more", source.path.display()))?;
    let sent_bytes = Arc::new(AtomicU64::new(0));
    let body = transport::streamed(chunks(file, Arc::clone(&sent_bytes)));
    let path = ImagePartPath { image: declared.id.to_string(), role };
    let sending = session.client.upload::<ImagePartUpload>(&path, &Nothing {}, body, size_bytes);
    let mut sending = std::pin::pin!(sending);
    let mut meter = Meter::new(format!("upload {}", role.as_str()), size_bytes);
    let subject = source.path.display().to_string();
    let mut ticks = tokio::time::interval(REPORT_INTERVAL);
    loop {
        tokio::select! {
            result = &mut sending => {
                reporter.transfer(&subject, &meter.at(sent_bytes.load(Ordering::Relaxed)))?;
                return result.map_err(|error| told_of(source, error.into_problem()).into());
            }
            _ = ticks.tick() => reporter.transfer(&subject, &meter.at(sent_bytes.load(Ordering::Relaxed)))?,
        }
    }
}

/// The manager knows the image's name and its part; the user knows the file.
fn told_of(source: &Source, problem: Problem) -> Problem {
    if problem.code != ProblemCode::BadImage {
        return problem;
    }
    let path = source.path.display();
    let role = source.part.role.as_str();
    let value = if problem.field.as_deref() == Some(role) { Some(path.to_string()) } else { problem.value };
    Problem { message: format!("{path}: {}", problem.message), value, ..problem }
}

fn chunks(
    file: tokio::fs::File,
    sent_bytes: Arc<AtomicU64>,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures_util::stream::try_unfold((file, sent_bytes), |(mut file, sent_bytes)| async move {
        let mut buffer = vec![0; CHUNK_BYTES];
        let read = file.read(&mut buffer).await?;
        if read == 0 {
            return Ok(None);
        }
        buffer.truncate(read);
        sent_bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(Some((Bytes::from(buffer), (file, sent_bytes))))
    })
}

/// Makes progress out of a count of bytes.
struct Meter {
    phase: String,
    total_bytes: u64,
    begun: Instant,
}

impl Meter {
    fn new(phase: String, total_bytes: u64) -> Self {
        Self { phase, total_bytes, begun: Instant::now() }
    }

    fn at(&mut self, done_bytes: u64) -> Progress {
        let elapsed_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let bytes_per_second = done_bytes.saturating_mul(1000).checked_div(elapsed_ms).unwrap_or(0);
        let left_bytes = self.total_bytes.saturating_sub(done_bytes);
        Progress {
            phase: self.phase.clone(),
            done_bytes,
            total_bytes: self.total_bytes,
            bytes_per_second,
            left_ms: left_bytes.saturating_mul(1000).checked_div(bytes_per_second),
            ..Progress::default()
        }
    }
}

#[cfg(test)]
mod tests;
