//! Disks made by the tools that everybody has (`mke2fs`, `qemu-img`), compared.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_inspect::disk::DiskError;
use berth_inspect::{Comparison, Disk, FileChangeKind, LayerFile, LayerFormat, Options, compare};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

const ALL: Options = Options { content: true, list_max: 1000 };

struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A file system of 16 MiB with what `fill` puts into a folder.
    fn file_system(&self, name: &str, kind: &str, fill: impl FnOnce(&Path)) -> PathBuf {
        let (folder, image) = (self.path(&format!("{name}.d")), self.path(name));
        fs::create_dir(&folder).expect("folder");
        fill(&folder);
        let words = ["-q", "-F", "-t", kind, "-d"];
        let program = if Path::new("/usr/sbin/mke2fs").exists() { "/usr/sbin/mke2fs" } else { "mke2fs" };
        run(Command::new(program).args(words).arg(&folder).arg(&image).arg("16M"));
        image
    }

    fn qcow2(&self, from: &Path, name: &str, options: &[&str]) -> PathBuf {
        let to = self.path(name);
        let mut command = Command::new("qemu-img");
        run(command.args(["convert", "-f", "raw", "-O", "qcow2"]).args(options).arg(from).arg(&to));
        to
    }
}

fn run(command: &mut Command) {
    let output = command.output().expect("the tool is there");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn raw(path: &Path) -> LayerFile {
    LayerFile { path: path.to_owned(), format: LayerFormat::Raw }
}

fn qcow2(path: &Path) -> LayerFile {
    LayerFile { path: path.to_owned(), format: LayerFormat::Qcow2 }
}

fn set_time(path: &Path, seconds: u64) {
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    fs::File::options().write(true).open(path).expect("open").set_modified(time).expect("time");
}

/// One line a change: `~ /etc/passwd content mode`.
fn lines(comparison: &Comparison) -> Vec<String> {
    let mut lines = Vec::new();
    for found in &comparison.file_systems {
        for change in &found.changes.list {
            let sign = match change.kind {
                FileChangeKind::Added => "+",
                FileChangeKind::Removed => "-",
                FileChangeKind::Modified => "~",
            };
            let aspects: String =
                change.aspects.iter().map(|aspect| format!(" {aspect:?}").to_lowercase()).collect();
            lines.push(format!("{sign} {}:{}{aspects}", found.volume, change.path));
        }
    }
    lines
}

fn before(folder: &Path) {
    for name in ["etc", "var", "var/log", "gone"] {
        fs::create_dir(folder.join(name)).expect("folder");
    }
    for (name, text) in [
        ("etc/passwd", "root"),
        ("etc/shadow", "secret"),
        ("var/log/a", "one"),
        ("gone/x", "x"),
        ("same", "same"),
    ] {
        fs::write(folder.join(name), text).expect("file");
        set_time(&folder.join(name), 1_000_000_000);
    }
    std::os::unix::fs::symlink("etc/passwd", folder.join("link")).expect("link");
}

fn after(folder: &Path) {
    before(folder);
    fs::write(folder.join("etc/passwd"), "root and somebody else").expect("file");
    // Of the same length, and the time set back: only its content tells.
    fs::write(folder.join("etc/shadow"), "public").expect("file");
    set_time(&folder.join("etc/shadow"), 1_000_000_000);
    fs::set_permissions(folder.join("var/log/a"), fs::Permissions::from_mode(0o4755)).expect("mode");
    fs::remove_dir_all(folder.join("gone")).expect("removed");
    fs::create_dir_all(folder.join("new/deep")).expect("folders");
    fs::write(folder.join("new/deep/file"), vec![7; 300_000]).expect("file");
    fs::remove_file(folder.join("link")).expect("link");
    std::os::unix::fs::symlink("etc/shadow", folder.join("link")).expect("link");
}

const EXPECTED: [&str; 9] = [
    "~ disk:/etc/passwd content time",
    "~ disk:/etc/shadow content",
    "- disk:/gone",
    "- disk:/gone/x",
    "~ disk:/link content",
    "~ disk:/var/log/a mode",
    "+ disk:/new",
    "+ disk:/new/deep",
    "+ disk:/new/deep/file",
];

fn expect(comparison: &Comparison) {
    let mut found = lines(comparison);
    // A symbolic link's own time is that of the test's run.
    found.iter_mut().for_each(|line| *line = line.replace("link content time", "link content"));
    assert_eq!(found, EXPECTED);
    assert_eq!(comparison.unread, [] as [&str; 0]);
    assert!(comparison.written_bytes > 0);
    let changes = &comparison.file_systems[0].changes;
    assert_eq!((changes.added, changes.removed, changes.modified), (3, 2, 4));
}

#[test]
fn each_kind_of_change_is_found_on_each_kind_of_ext() {
    for kind in ["ext2", "ext4"] {
        let lab = Lab::new();
        let (old, new) = (lab.file_system("old", kind, before), lab.file_system("new", kind, after));
        expect(&compare(&[raw(&old)], &[raw(&new)], ALL).expect("compared"));
    }
}

#[test]
fn plain_and_compressed_qcow2_read_as_the_disk_does() {
    for options in [&[][..], &["-c"], &["-o", "cluster_size=4k"], &["-c", "-o", "cluster_size=2M"]] {
        let lab = Lab::new();
        let (old, new) = (lab.file_system("old", "ext4", before), lab.file_system("new", "ext4", after));
        let packed = lab.qcow2(&new, "new.qcow2", options);
        expect(&compare(&[raw(&old)], &[qcow2(&packed)], ALL).expect("compared"));
    }
}

#[test]
fn without_reading_content_a_file_whose_time_was_set_back_is_not_seen() {
    let lab = Lab::new();
    let (old, new) = (lab.file_system("old", "ext4", before), lab.file_system("new", "ext4", after));
    let quick = Options { content: false, list_max: 1000 };
    let found = lines(&compare(&[raw(&old)], &[raw(&new)], quick).expect("compared"));
    assert!(found.iter().any(|line| line.starts_with("~ disk:/etc/passwd")), "{found:?}");
    assert!(!found.iter().any(|line| line.contains("shadow")), "{found:?}");
}

#[test]
fn the_list_is_cut_and_the_counts_are_not() {
    let lab = Lab::new();
    let (old, new) = (lab.file_system("old", "ext4", before), lab.file_system("new", "ext4", after));
    let short = Options { content: true, list_max: 2 };
    let comparison = compare(&[raw(&old)], &[raw(&new)], short).expect("compared");
    assert_eq!(lines(&comparison).len(), 2);
    assert_eq!(comparison.file_systems[0].changes.added, 3);
}

#[test]
fn layers_that_both_stand_on_are_not_counted_and_one_disk_is_as_itself() {
    let lab = Lab::new();
    let base = lab.file_system("base", "ext4", before);
    let top = lab.path("top.qcow2");
    let backing = format!("backing_file={},backing_fmt=raw", base.display());
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", &backing]).arg(&top));
    let write = ["-c", "write -P 9 15M 64k"];
    run(Command::new("qemu-io").args(["-f", "qcow2"]).args(write).arg(&top));
    let comparison = compare(&[raw(&base)], &[raw(&base), qcow2(&top)], ALL).expect("compared");
    assert_eq!(comparison.written_bytes, 64 << 10);
    assert_eq!(lines(&comparison), [] as [&str; 0], "no file was touched");
    let same = compare(&[raw(&base)], &[raw(&base)], ALL).expect("compared");
    assert_eq!((same.written_bytes, same.file_systems.len()), (0, 0));
}

#[test]
fn partitions_of_both_tables_are_found_and_other_file_systems_are_said_to_be_unread() {
    let lab = Lab::new();
    let (old, new) = (lab.file_system("old", "ext4", before), lab.file_system("new", "ext4", after));
    for table in [old_table as fn(&fs::File), guid_table] {
        let disks: Vec<PathBuf> = [("a", &old), ("b", &new)]
            .map(|(name, content)| {
                let path = lab.path(name);
                let disk = fs::File::create(&path).expect("disk");
                disk.set_len(40 << 20).expect("length");
                table(&disk);
                disk.write_all_at(&fs::read(content).expect("content"), 1 << 20).expect("first");
                disk.write_all_at(b"XFSB", 20 << 20).expect("second");
                path
            })
            .to_vec();
        let comparison = compare(&[raw(&disks[0])], &[raw(&disks[1])], ALL).expect("compared");
        assert_eq!(lines(&comparison).len(), EXPECTED.len());
        assert!(lines(&comparison).iter().all(|line| line.contains(" p1:/")));
        assert_eq!(comparison.unread, ["p2: no ext2, ext3 or ext4 file system"]);
    }
}

/// Start and length of the two partitions, in sectors: 16 MiB from 1 MiB on, 8 MiB from 20 MiB on.
const PARTITIONS: [(u64, u64); 2] = [(2048, 32768), (40960, 16384)];

fn old_table(disk: &fs::File) {
    let mut sector = [0; 512];
    for (number, (start, length)) in PARTITIONS.iter().enumerate() {
        let at = 446 + 16 * number;
        sector[at + 4] = 0x83;
        sector[at + 8..at + 12].copy_from_slice(&u32::try_from(*start).expect("small").to_le_bytes());
        sector[at + 12..at + 16].copy_from_slice(&u32::try_from(*length).expect("small").to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write_all_at(&sector, 0).expect("table");
}

fn guid_table(disk: &fs::File) {
    let mut bytes = vec![0; 2048];
    bytes[450] = 0xee;
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[512..520].copy_from_slice(b"EFI PART");
    bytes[584..592].copy_from_slice(&2_u64.to_le_bytes());
    bytes[592..596].copy_from_slice(&128_u32.to_le_bytes());
    bytes[596..600].copy_from_slice(&128_u32.to_le_bytes());
    for (number, (start, length)) in PARTITIONS.iter().enumerate() {
        let at = 1024 + 128 * number;
        bytes[at] = 1;
        bytes[at + 32..at + 40].copy_from_slice(&start.to_le_bytes());
        bytes[at + 40..at + 48].copy_from_slice(&(start + length - 1).to_le_bytes());
    }
    disk.write_all_at(&bytes, 0).expect("table");
}

#[test]
fn a_layer_that_is_cut_off_is_an_error_that_names_it() {
    let lab = Lab::new();
    let packed = lab.qcow2(&lab.file_system("fs", "ext4", before), "cut.qcow2", &[]);
    fs::File::options().write(true).open(&packed).expect("open").set_len(1000).expect("cut");
    let error = compare(&[qcow2(&packed)], &[qcow2(&packed)], ALL).expect_err("cut");
    assert!(matches!(&error, DiskError::Layer { path, .. } if *path == packed), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A disk of random layers reads as the same layers do in QEMU's order: the topmost that has a place counts.
    #[test]
    fn the_topmost_layer_that_has_a_place_counts(
        writes in prop::collection::vec(prop::collection::vec((0..30_u64, 1..4_u64, any::<u8>()), 0..5), 1..4),
    ) {
        let lab = Lab::new();
        let mut expected = vec![0_u8; 32 << 16];
        let mut layers: Vec<LayerFile> = Vec::new();
        for (number, writes) in writes.iter().enumerate() {
            let path = lab.path(&format!("{number}.qcow2"));
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2"]);
            if let Some(below) = layers.last() {
                create.args(["-F", "qcow2", "-b"]).arg(&below.path);
            }
            run(create.arg(&path).arg("2M"));
            let mut io = Command::new("qemu-io");
            for (cluster, count, pattern) in writes {
                let (at, length) = (cluster << 16, (count.min(&(32 - cluster))) << 16);
                io.args(["-c", &format!("write -P {pattern} {at} {length}")]);
                let range = usize::try_from(at).expect("small")..usize::try_from(at + length).expect("small");
                expected[range].fill(*pattern);
            }
            if !writes.is_empty() {
                run(io.args(["-f", "qcow2"]).arg(&path));
            }
            layers.push(qcow2(&path));
        }
        let mut found = vec![1; expected.len()];
        Disk::open(&layers).expect("disk").read_at(0, &mut found).expect("read");
        prop_assert!(found == expected);
    }
}

/// Whatever a guest or a disk's fault makes of a layer: no panic, no endless walk, no memory eaten.
#[test]
fn a_damaged_disk_is_an_error_or_some_comparison() {
    let lab = Lab::new();
    let good = lab.file_system("good", "ext4", before);
    let packed = lab.qcow2(&lab.file_system("other", "ext4", after), "other.qcow2", &["-c"]);
    let bad = lab.path("bad.qcow2");
    let damages = prop::collection::vec((0..3_000_000_u64, any::<[u8; 8]>()), 1..30);
    let mut runner =
        TestRunner::new(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) });
    runner
        .run(&damages, |damage| {
            fs::copy(&packed, &bad).expect("copy");
            let file = fs::File::options().write(true).open(&bad).expect("open");
            let length = file.metadata().expect("length").len();
            for (at, bytes) in damage {
                // Half of it goes where the tables are.
                let at = if bytes[0] & 1 == 0 { at % length } else { at % length.min(300_000) };
                file.write_all_at(&bytes, at).expect("damage");
            }
            // Which of the two it is depends on the damage: that it comes to an end is what is tested.
            let _ = compare(&[raw(&good)], &[qcow2(&bad)], ALL);
            Ok(())
        })
        .expect("no damage leads to a panic");
}
