//! What is written here is restic's, by restic's own word; and what comes out is what went in.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use berth_backup::export::SourceFile;
use berth_backup::{BackupError, Label, Repository};
use berth_model::repository::{RepositoryAccess, RepositoryKeys, Secret};

const PASSWORD: &str = "correct horse";
const MIB: usize = 1 << 20;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory") }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn access(&self) -> RepositoryAccess {
        access(&self.at("repository").display().to_string(), PASSWORD)
    }

    fn init(&self) -> Repository {
        Repository::init(&self.access(), &Arc::default()).expect("a new repository")
    }

    fn open(&self) -> Repository {
        Repository::open(&self.access(), &Arc::default()).expect("the repository")
    }

    /// Files as a VM has them: a sparse memory image, layers of which two are alike, and small things.
    fn files(&self) -> Vec<SourceFile> {
        let directory = self.at("vm");
        fs::create_dir_all(directory.join("layers")).expect("made");
        let file = |name: &str| SourceFile { name: name.to_owned(), path: directory.join(name) };
        write(&file("backup.json").path, b"{}");
        write(&file("layers/a.qcow2").path, &noise(1, 6 * MIB));
        write(&file("layers/b.qcow2").path, &noise(1, 6 * MIB));
        let memory = file("memory.raw");
        let mut sparse = File::create(&memory.path).expect("made");
        sparse.seek(SeekFrom::Start(40 * MIB as u64)).expect("sought");
        sparse.write_all(&noise(2, MIB)).expect("written");
        sparse.set_len(64 * MIB as u64).expect("set");
        write(&file("empty").path, b"");
        ["backup.json", "layers/a.qcow2", "layers/b.qcow2", "memory.raw", "empty"].map(file).to_vec()
    }

    fn restic(&self, arguments: &[&str]) -> Output {
        let output = Command::new("restic")
            .args(arguments)
            .env("RESTIC_REPOSITORY", self.at("repository"))
            .env("RESTIC_PASSWORD", PASSWORD)
            .env("HOME", self.directory.path())
            .env("XDG_CACHE_HOME", self.at("cache"))
            .output();
        output.expect("restic runs: 'make deps' installs it")
    }

    fn restic_says(&self, arguments: &[&str]) -> String {
        let output = self.restic(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "restic {arguments:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    fn packs(&self) -> Vec<PathBuf> {
        let mut packs = Vec::new();
        for directory in fs::read_dir(self.at("repository/data")).expect("packs").flatten() {
            packs.extend(fs::read_dir(directory.path()).expect("listed").flatten().map(|entry| entry.path()));
        }
        packs
    }
}

fn access(url: &str, password: &str) -> RepositoryAccess {
    let keys =
        RepositoryKeys { password: Secret::new(password.to_owned()), key: None, known_hosts: None, ca: None };
    RepositoryAccess { url: url.parse().expect("a place"), keys }
}

fn label(snapshot: &str, operation: &str) -> Label {
    Label {
        vm: "accounting/books".to_owned(),
        vm_id: "vm-0000000000000001".to_owned(),
        snapshot: snapshot.to_owned(),
        operation: operation.to_owned(),
    }
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("written");
}

/// Bytes that don't compress, always the same.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..count / 8).flat_map(|_| next().to_le_bytes()).collect()
}

fn assert_same(files: &[SourceFile], directory: &Path) {
    for file in files {
        let (was, is) =
            (fs::read(&file.path).expect("source"), fs::read(directory.join(&file.name)).expect("copy"));
        assert!(was == is, "{} came out otherwise", file.name);
    }
}

#[test]
fn restic_checks_lists_and_restores_what_was_exported() {
    let place = Place::new();
    let files = place.files();
    let facts = place.init().export(&label("before-close", "op-1"), &files).expect("exported");
    assert_eq!(facts.bytes, (12 + 64) as u64 * MIB as u64 + 2);
    assert!(facts.added_bytes < 9 * MIB as u64, "{facts:?}: holes and what is alike cost no room");
    assert_eq!(fs::read_dir(place.at("repository/locks")).map_or(0, Iterator::count), 0, "the lock is gone");

    place.restic_says(&["check", "--read-data"]);
    let list = place.restic_says(&["snapshots", "--json"]);
    for word in ["accounting/books", "snapshot=before-close", "operation=op-1", facts.backup.as_str()] {
        assert!(list.contains(word), "{word} in {list}");
    }
    let target = place.at("restored");
    place.restic_says(&["restore", "latest", "--target", &target.display().to_string()]);
    assert_same(&files, &target.join("berth/vm-0000000000000001"));
    place.open().check(true).expect("whole by our own word as well");
}

#[test]
fn the_second_export_reads_and_stores_what_is_new() {
    let place = Place::new();
    let mut files = place.files();
    let repository = place.init();
    let first = repository.export(&label("one", "op-1"), &files).expect("exported");
    // The next snapshot: one layer more, and the others as links elsewhere.
    let next = place.at("links");
    fs::create_dir(&next).expect("made");
    for (index, file) in files.iter_mut().enumerate() {
        let link = next.join(index.to_string());
        fs::hard_link(&file.path, &link).expect("linked");
        file.path = link;
    }
    let path = next.join("c");
    write(&path, &noise(3, MIB));
    files.push(SourceFile { name: "layers/c.qcow2".to_owned(), path });
    let second = place.open().export(&label("two", "op-2"), &files).expect("exported");
    assert_eq!(second.read_bytes, MIB as u64, "what the last backup has is not read: {second:?}");
    assert!(second.added_bytes < first.added_bytes / 4, "{second:?}");
    assert_eq!(second.bytes, first.bytes + MIB as u64);
    assert_eq!(place.open().list().expect("listed").len(), 2);
    // Asked for again by the same operation, it is there already.
    let again = place.open().export(&label("two", "op-2"), &files).expect("exported");
    assert_eq!((again.backup, again.read_bytes), (second.backup, 0));
    assert_eq!(place.open().list().expect("listed").len(), 2);
    place.restic_says(&["check", "--read-data"]);
}

#[test]
fn what_was_exported_comes_out_with_its_holes_and_what_restic_put_in_beside_it_is_left_alone() {
    let place = Place::new();
    let files = place.files();
    let facts = place.init().export(&label("one", "op-1"), &files).expect("exported");
    place.restic_says(&["backup", &place.at("vm").display().to_string()]);
    let repository = place.open();
    let listed = repository.list().expect("listed");
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].vm.as_str(), listed[0].snapshot.as_str()), ("accounting/books", "one"));
    assert_eq!(listed[0].id, facts.backup);
    let (_, text) = repository.look(&facts.backup[..8], "backup.json", 100).expect("looked");
    assert_eq!(text, b"{}");
    assert!(matches!(repository.look(&facts.backup, "memory.raw", 100), Err(BackupError::Foreign { .. })));

    let target = place.at("restored");
    fs::create_dir(&target).expect("made");
    let imported = repository.import(&facts.backup, &target, u64::MAX).expect("imported");
    assert_same(&files, &target);
    assert_eq!(imported.bytes, facts.bytes);
    let memory = fs::metadata(target.join("memory.raw")).expect("there");
    assert!(memory.blocks() * 512 <= 2 * MIB as u64, "{} blocks: holes are holes", memory.blocks());
    let again = repository.import(&facts.backup, &target, u64::MAX).expect_err("nothing is written over");
    assert!(matches!(again, BackupError::File { .. }), "{again}");
    let long = repository.import(&facts.backup, &place.at("x"), 1000).expect_err("too long");
    assert!(matches!(long, BackupError::Foreign { .. }), "{long}");
}

#[test]
fn a_wrong_password_a_missing_repository_and_a_second_one_are_told_apart() {
    let place = Place::new();
    let missing = Repository::open(&place.access(), &Arc::default()).err().expect("none");
    assert!(matches!(missing, BackupError::NoRepository { .. }), "{missing}");
    place.init();
    let wrong = access(&place.at("repository").display().to_string(), "wrong");
    let refused = Repository::open(&wrong, &Arc::default()).err().expect("wrong");
    assert!(matches!(refused, BackupError::WrongPassword { .. }), "{refused}");
    assert!(refused.to_string().contains(&place.at("repository").display().to_string()), "{refused}");
    let twice = Repository::init(&place.access(), &Arc::default()).err().expect("twice");
    assert!(matches!(twice, BackupError::AlreadyThere { .. }), "{twice}");
}

#[test]
fn a_pack_that_is_cut_or_gone_is_refused() {
    let place = Place::new();
    let files = place.files();
    let facts = place.init().export(&label("one", "op-1"), &files).expect("exported");
    let longest =
        place.packs().into_iter().max_by_key(|pack| fs::metadata(pack).expect("there").len()).expect("one");
    let bytes = fs::read(&longest).expect("read");
    let target = |name: &str| {
        let target = place.at(name);
        fs::create_dir(&target).expect("made");
        target
    };
    let mut flipped = bytes.clone();
    flipped[100] ^= 1;
    write(&longest, &flipped);
    let refused = place.open().import(&facts.backup, &target("flipped"), u64::MAX).expect_err("flipped");
    assert!(matches!(refused, BackupError::Damaged { .. }), "{refused}");
    write(&longest, &bytes[..bytes.len() / 2]);
    let refused = place.open().import(&facts.backup, &target("cut"), u64::MAX).expect_err("cut");
    assert!(matches!(refused, BackupError::Damaged { .. } | BackupError::Store(_)), "{refused}");
    assert!(place.open().check(false).is_err());
    fs::remove_file(&longest).expect("removed");
    let refused = place.open().import(&facts.backup, &target("gone"), u64::MAX).expect_err("gone");
    assert!(matches!(refused, BackupError::Store(_)), "{refused}");
}

#[test]
fn a_file_that_can_not_be_read_leaves_no_backup() {
    let place = Place::new();
    let mut files = place.files();
    let repository = place.init();
    // A directory can be opened and not read.
    files[2].path = place.at("vm/layers");
    let refused = repository.export(&label("one", "op-1"), &files).expect_err("unreadable");
    assert!(matches!(refused, BackupError::File { .. }), "{refused}");
    assert_eq!(place.open().list().expect("listed"), Vec::new());
}

#[test]
fn nobody_writes_while_somebody_has_the_repository_for_himself_and_restic_waits_for_us() {
    let place = Place::new();
    let files = place.files();
    let repository = place.init();
    repository.export(&label("one", "op-1"), &files).expect("exported");
    let held = repository.lock().expect("a lock");
    let prune = place.restic(&["prune"]);
    assert!(!prune.status.success(), "a prune beside us would take what is being written");
    assert!(String::from_utf8_lossy(&prune.stderr).contains("lock"), "{prune:?}");
    drop(held);
    place.restic_says(&["prune"]);
}

/// Whatever else a repository holds, nothing of it gets onto the host's disk.
#[test]
fn links_and_names_that_are_not_ours_are_refused() {
    let place = Place::new();
    place.init();
    for (index, make) in [
        (|at: &Path| std::os::unix::fs::symlink("/etc/passwd", at.join("memory.raw")).expect("linked"))
            as fn(&Path),
        |at| write(&at.join(".hidden"), b"x"),
        |at| write(&at.join("two words"), b"x"),
        |at| fs::create_dir_all(at.join("a/b/c")).expect("made"),
    ]
    .into_iter()
    .enumerate()
    {
        let at = place.at(&format!("hostile-{index}"));
        fs::create_dir(&at).expect("made");
        make(&at);
        place.restic_says(&["backup", "--tag", "berth", &at.display().to_string()]);
    }
    let repository = place.open();
    let listed = repository.list().expect("listed");
    assert_eq!(listed.len(), 4);
    for backup in listed {
        let target = place.at(&backup.id);
        fs::create_dir(&target).expect("made");
        let refused = repository.import(&backup.id, &target, u64::MAX).expect_err("hostile");
        assert!(matches!(refused, BackupError::Foreign { .. }), "{refused}");
        assert_eq!(fs::read_dir(&target).expect("there").count(), 0, "nothing was written");
    }
}
