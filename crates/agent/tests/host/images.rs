//! Images that are taken, images that are refused, and nothing left of those.

use std::path::Path;
use std::process::Command;

use berth_api::agent::{PartQuery, PoolImagePath, PoolImageUpload, TaskSpec};
use berth_model::image::PartRole;
use berth_model::{ImageId, ProblemCode};

use crate::support::{Host, sha256};

fn image() -> ImageId {
    ImageId::from_entropy([5; 10])
}

/// The bytes of a qcow2 made by the real tool.
fn qcow2(directory: &Path, options: &[&str]) -> Vec<u8> {
    let path = directory.join("made.qcow2");
    let mut command = Command::new("/usr/bin/qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).args(options).arg(&path).arg("8M");
    assert!(command.status().expect("ran").success());
    std::fs::read(path).expect("made")
}

async fn refused(host: &Host, format: &str, bytes: Vec<u8>, sha256: String) -> berth_model::Problem {
    let problem = host.upload(&image(), PartRole::Disk, format, bytes, sha256).await.expect_err("refused");
    assert_eq!(host.files("pool/images"), Vec::<String>::new(), "{problem}");
    assert!(!host.pool().join("images").join(image().as_str()).exists(), "{problem}");
    problem
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_image_is_taken_once_and_removed_only_when_nothing_needs_it() {
    let host = Host::start().await;
    let bytes = qcow2(host.root.path(), &[]);
    for _ in 0..2 {
        let stored = host.upload(&image(), PartRole::Disk, "qcow2", bytes.clone(), sha256(&bytes)).await;
        assert_eq!(stored.expect("taken").virtual_size_bytes, 8 << 20);
    }
    let delete = TaskSpec::DeleteImage { image: image(), pool: "local".parse().expect("name") };
    host.task_of(None, 0, delete).await.expect("deleted");
    assert_eq!(host.files("pool/images"), Vec::<String>::new());
    let definition = host.vm_on_a_blank_disk(1).await;
    let prepare = TaskSpec::PrepareVm { definition: Box::new(definition.clone()) };
    host.task(&definition.id, prepare).await.expect("prepared");
    let delete =
        TaskSpec::DeleteImage { image: definition.image.id.clone(), pool: "local".parse().expect("name") };
    let problem = host.task_of(None, 0, delete).await.expect_err("in use");
    assert_eq!(problem.code, ProblemCode::Protected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_not_what_was_said_are_refused() {
    let host = Host::start().await;
    let bytes = qcow2(host.root.path(), &[]);
    let problem = refused(&host, "qcow2", bytes.clone(), sha256(b"other")).await;
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::BadImage, Some("sha256")));
    let problem = refused(&host, "qcow2", bytes.clone(), "abc".into()).await;
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::InvalidInput, Some("sha256")));
    let problem = refused(&host, "vmdk", bytes, sha256(b"")).await;
    assert_eq!(problem.field.as_deref(), Some("format"));
    let raw = vec![1u8; 4096];
    let problem = refused(&host, "qcow2", raw.clone(), sha256(&raw)).await;
    assert!(problem.message.contains("not a qcow2"), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_that_name_other_files_or_are_cut_short_are_refused() {
    let host = Host::start().await;
    let root = host.root.path();
    let base = root.join("base.raw");
    std::fs::write(&base, vec![0u8; 8 << 20]).expect("base");
    let backed = qcow2(root, &["-b", base.to_str().expect("path"), "-F", "raw"]);
    let problem = refused(&host, "qcow2", backed.clone(), sha256(&backed)).await;
    assert!(problem.message.contains("backing file"), "{problem}");
    let data = root.join("data.raw");
    let option = format!("data_file={}", data.display());
    let split = qcow2(root, &["-o", &option]);
    let problem = refused(&host, "qcow2", split.clone(), sha256(&split)).await;
    assert!(problem.message.contains("data file"), "{problem}");
    let mut cut = qcow2(root, &[]);
    cut.truncate(100_000);
    let problem = refused(&host, "qcow2", cut.clone(), sha256(&cut)).await;
    assert!(problem.message.contains("truncated"), "{problem}");
    let mut damaged = qcow2(root, &["-o", "preallocation=metadata"]);
    let level1 = u64::from_be_bytes(damaged[40..48].try_into().expect("eight")) as usize;
    damaged[level1..level1 + 8].copy_from_slice(&0x7fff_ffff_ffff_0000_u64.to_be_bytes());
    let problem = refused(&host, "qcow2", damaged.clone(), sha256(&damaged)).await;
    assert!(problem.message.contains("damaged"), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kernels_are_raw_and_a_pool_that_is_not_there_is_named() {
    let host = Host::start().await;
    let bytes = b"kernel".to_vec();
    let wrong = host.upload(&image(), PartRole::Kernel, "qcow2", bytes.clone(), sha256(&bytes)).await;
    assert_eq!(wrong.expect_err("refused").field.as_deref(), Some("format"));
    let fetch = TaskSpec::DeleteImage { image: image(), pool: "nowhere".parse().expect("name") };
    let problem = host.task_of(None, 0, fetch).await.expect_err("no pool");
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::NotFound, Some("pool")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_breaks_off_leaves_nothing() {
    let host = Host::start().await;
    let path = PoolImagePath { pool: "local".parse().expect("name"), image: image(), role: PartRole::Disk };
    let query = PartQuery { format: "raw".into(), size_bytes: 1 << 20, sha256: sha256(b"") };
    let pieces =
        [Ok(bytes::Bytes::from(vec![1u8; 600_000])), Err(std::io::Error::other("the cable was pulled"))];
    let body = berth_api::transport::streamed(futures_util::stream::iter(pieces));
    let broken = host.client().upload::<PoolImageUpload>(&path, &query, body, 1 << 20).await;
    assert_eq!(broken.expect_err("broken off").into_problem().code, ProblemCode::BadImage);
    // A sender who goes away without a word: what waits for the rest is dropped.
    let pieces =
        futures_util::stream::iter([Ok::<_, std::io::Error>(bytes::Bytes::from(vec![1u8; 600_000]))]);
    let endless = futures_util::StreamExt::chain(pieces, futures_util::stream::pending());
    let client = host.client();
    let upload =
        client.upload::<PoolImageUpload>(&path, &query, berth_api::transport::streamed(endless), 1 << 20);
    let gone = tokio::time::timeout(std::time::Duration::from_millis(300), upload).await;
    assert!(gone.is_err(), "nobody waits for ever: {gone:?}");
    assert_eq!(host.files("pool/images"), Vec::<String>::new());
}
