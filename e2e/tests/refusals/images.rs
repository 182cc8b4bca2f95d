//! Images that are not what they should be: cut, damaged, standing on others, not what their checksum says.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use berth_e2e::testing::up;

use super::{Stand, refused, wanted};

/// Where a qcow2 head says that its first table begins.
const L1_AT: usize = 40;
/// The bits of an entry that are an offset.
const OFFSET_BITS: u64 = 0x00ff_ffff_ffff_fe00;

fn qemu(tool: &str, words: &[&str]) -> Result<()> {
    let output = Command::new(tool).args(words).output().with_context(|| tool.to_owned())?;
    ensure!(output.status.success(), "{tool} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn number_at(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + 8).context("the image is too short")?;
    Ok(u64::from_be_bytes(field.try_into()?))
}

/// Points the first cluster of data at one that nobody counts.
fn damage(bytes: &mut [u8]) -> Result<()> {
    let l1 = usize::try_from(number_at(bytes, L1_AT)?)?;
    let l2 = usize::try_from(number_at(bytes, l1)? & OFFSET_BITS)?;
    let entry = (1u64 << 63) | (1 << 40) | 0x10000;
    bytes.get_mut(l2..l2 + 8).context("the image is too short")?.copy_from_slice(&entry.to_be_bytes());
    Ok(())
}

fn make_bad_ones(folder: &Path) -> Result<()> {
    let text = |name: &str| folder.join(name).display().to_string();
    let good = text("good.qcow2");
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", &good, "64M"])?;
    qemu("qemu-io", &["-c", "write -q -P 7 0 4M", &good])?;
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &good, &text("backed.qcow2")])?;
    let bytes = std::fs::read(&good)?;
    std::fs::write(text("cut.qcow2"), &bytes[..500_000])?;
    std::fs::write(text("head.qcow2"), &bytes[..60])?;
    std::fs::write(text("other.qcow2"), vec![7; 100_000])?;
    std::fs::write(text("empty.qcow2"), "")?;
    let mut damaged = bytes;
    damage(&mut damaged)?;
    std::fs::write(text("damaged.qcow2"), damaged)?;
    Ok(())
}

#[test]
fn an_image_that_is_not_whole_is_refused_and_nothing_of_it_is_kept() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    make_bad_ones(folder.path())?;
    let before = Stand::of(&cluster)?;
    for (name, says) in [
        ("cut.qcow2", "damaged"),
        ("head.qcow2", "truncated"),
        ("damaged.qcow2", "damaged"),
        ("backed.qcow2", "backing file"),
        ("other.qcow2", "not a qcow2 image"),
    ] {
        let path = folder.path().join(name).display().to_string();
        let words = ["image", "import", &path, "--format", "qcow2", "--name", "new"];
        let wanted = wanted("bad-image", 1, "disk", &path, "a whole and undamaged qcow2 file");
        let refusal = refused(&cluster, &words, wanted)?;
        ensure!(refusal.text.contains(says), "{name}: {}", refusal.text);
        before.unchanged(|| Stand::of(&cluster)).with_context(|| name.to_owned())?;
    }
    for (name, expected) in [("empty.qcow2", "not empty"), ("none.qcow2", "a file that can be read")] {
        let path = folder.path().join(name).display().to_string();
        let words = ["image", "import", &path, "--format", "qcow2", "--name", "new"];
        refused(&cluster, &words, wanted("invalid-input", 2, "disk", &path, expected))?;
    }
    // What is refused for its content is not refused for its name: the good one may have it.
    let good = folder.path().join("good.qcow2").display().to_string();
    cluster.berth.run(&["image", "import", &good, "--format", "qcow2", "--name", "new"])?;
    cluster.down()
}

#[test]
fn a_checksum_that_does_not_match_is_said_with_both() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let before = Stand::of(&cluster)?;
    let path = folder.path().join("hello.raw");
    std::fs::write(&path, "hello")?;
    let path = path.to_str().context("path")?;
    let (right, wrong) =
        ("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "ab".repeat(32));
    let import =
        |sum| ["image", "import", path, "--format", "raw", "--name", "hello", "--sha256", sum].to_vec();
    refused(&cluster, &import(&wrong), wanted("bad-image", 1, "sha256", right, &wrong))?;
    refused(&cluster, &import("abc"), wanted("invalid-input", 2, "sha256", "abc", "64 hexadecimal digits"))?;
    before.unchanged(|| Stand::of(&cluster))?;
    cluster.berth.run(&import(right))?;
    cluster.down()
}
