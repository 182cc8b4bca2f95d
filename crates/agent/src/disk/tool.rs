//! `qemu-img`, in a process that can do nothing but what it is asked: it reads what strangers wrote.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use berth_api::transport::BoxFuture;
use berth_model::{Problem, ProblemCode};

use super::merging::{self, Merging};
use super::pace::Pace;
use super::{ImageTool, NewLayer, WRITABLE_MODE, no_space};
use crate::durable::{self, FileError, blocking};
use crate::sandbox::{self, Confinement, Limits};

/// How long making a layer may take: it writes some 200 kB.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a check may take: it reads all of an image's tables, not its data.
const CHECK_TIMEOUT: Duration = Duration::from_secs(300);
/// Most address space: a check holds a counter for each cluster, 32 MB a TiB.
const MEMORY_BYTES_MAX: u64 = 4 << 30;
/// Largest file that making a layer may write: an empty one of the largest disk has tables of a few MiB.
const LAYER_BYTES_MAX: u64 = 64 << 20;
/// The codes of `qemu-img check` for a good image, and for one with clusters that nothing uses, which harms nobody.
const CHECK_GOOD: [i32; 2] = [0, 3];

/// Runs `qemu-img`.
#[derive(Debug, Clone)]
pub struct QemuImg {
    binary: PathBuf,
    check_user: Option<u32>,
}

impl QemuImg {
    /// A tool of this binary, which checks strangers' files as `check_user`.
    pub const fn new(binary: PathBuf, check_user: Option<u32>) -> Self {
        Self { binary, check_user }
    }

    async fn create(&self, layer: NewLayer) -> Result<(), Problem> {
        let (path, user_id) = (layer.path.clone(), layer.user_id);
        blocking(move || Ok(make_empty(&path, user_id)?)).await?;
        let mut arguments = vec!["create".to_owned(), "-q".into(), "-f".into(), "qcow2".into()];
        if let Some(backing) = &layer.backing {
            arguments.extend(["-u".into(), "-F".into(), backing.format.as_str().into()]);
            arguments.extend(["-b".into(), backing.relative_path.display().to_string()]);
        }
        arguments.extend([layer.path.display().to_string(), layer.virtual_size_bytes.to_string()]);
        let limits = Limits {
            cpu_s: Some(CREATE_TIMEOUT.as_secs()),
            memory_bytes: Some(MEMORY_BYTES_MAX),
            file_bytes: Some(LAYER_BYTES_MAX),
        };
        let made = self.run(&arguments, layer.user_id, limits, CREATE_TIMEOUT).await;
        let made = match made {
            Ok(output) if output.status.success() => sync(layer.path.clone()).await,
            Ok(output) => Err(tool_problem("making a layer", &output, &layer.path)),
            Err(problem) => Err(problem),
        };
        if made.is_err() {
            // The error that counts is the first one.
            let _ = fs::remove_file(&layer.path);
        }
        made
    }

    async fn check(&self, path: &Path) -> Result<(), Problem> {
        let arguments: Vec<String> = ["check", "-q", "-f", "qcow2"]
            .into_iter()
            .map(str::to_owned)
            .chain([path.display().to_string()])
            .collect();
        let limits = Limits {
            cpu_s: Some(CHECK_TIMEOUT.as_secs()),
            memory_bytes: Some(MEMORY_BYTES_MAX),
            file_bytes: Some(0),
        };
        let output = self.run(&arguments, self.check_user, limits, CHECK_TIMEOUT).await?;
        if output.status.code().is_some_and(|code| CHECK_GOOD.contains(&code)) {
            return Ok(());
        }
        let words = last_line(&output);
        Err(Problem::new(ProblemCode::BadImage, format!("the image is damaged: {words}")))
    }

    async fn run(
        &self,
        arguments: &[String],
        user_id: Option<u32>,
        limits: Limits,
        timeout: Duration,
    ) -> Result<Output, Problem> {
        let mut command = Command::new(&self.binary);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        sandbox::confine(&mut command, Confinement { user_id, groups: Vec::new(), limits }, Vec::new());
        let output = tokio::process::Command::from(command).kill_on_drop(true).output();
        let broke = |detail: String| {
            Problem::new(ProblemCode::Internal, format!("{} {detail}", self.binary.display()))
        };
        match tokio::time::timeout(timeout, output).await {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(error)) => Err(broke(format!("can't be run: {error}"))),
            Err(_) => Err(broke(format!("did not end within {} s", timeout.as_secs()))),
        }
    }
}

impl ImageTool for QemuImg {
    fn create_layer(&self, layer: NewLayer) -> BoxFuture<'_, Result<(), Problem>> {
        Box::pin(self.create(layer))
    }

    fn merge_layers(&self, work: Merging, pace: Pace) -> BoxFuture<'_, Result<(), Problem>> {
        Box::pin(blocking(move || Ok(merging::merge(&work, &pace)?)))
    }

    fn measure_layers(&self, layers: Vec<PathBuf>) -> BoxFuture<'_, Result<u64, Problem>> {
        Box::pin(blocking(move || Ok(merging::measure(&layers)?)))
    }

    fn check_qcow2<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, Result<(), Problem>> {
        Box::pin(self.check(path))
    }
}

/// An empty file that the VM's user has, in a directory that he can't write to.
fn make_empty(path: &Path, user_id: Option<u32>) -> Result<(), FileError> {
    durable::remove_file(path)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(WRITABLE_MODE).open(path);
    let file = file.map_err(FileError::io(path, "made"))?;
    match user_id {
        Some(id) => {
            std::os::unix::fs::fchown(file, Some(id), Some(id)).map_err(FileError::io(path, "given away"))
        }
        None => Ok(()),
    }
}

async fn sync(path: PathBuf) -> Result<(), Problem> {
    blocking(move || {
        File::open(&path).and_then(|file| file.sync_all()).map_err(FileError::io(&path, "synced"))?;
        Ok(durable::sync_parent(&path)?)
    })
    .await
}

fn tool_problem(doing: &str, output: &Output, path: &Path) -> Problem {
    let words = last_line(output);
    if words.contains("No space left on device") || words.contains("Disk quota exceeded") {
        return no_space(path.parent().unwrap_or(path));
    }
    Problem::new(ProblemCode::Internal, format!("{doing} failed: {words}"))
}

fn last_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = if text.trim().is_empty() { String::from_utf8_lossy(&output.stdout) } else { text };
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    match line {
        "" => format!("qemu-img {}", output.status),
        line => line.trim().to_owned(),
    }
}
