//! Held against QEMU's own tools: what they read of the merged layer is what they read of the layers that went into it.

use std::process::Command;

use proptest::prelude::*;

use super::*;
use berth_model::image::PartFormat;

const DISK_MIB: u64 = 600;

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Something that a guest does to its disk.
#[derive(Debug, Clone)]
enum Deed {
    Write { kib: u64, length_kib: u64, pattern: u8 },
    Zero { kib: u64, length_kib: u64 },
    Discard { kib: u64, length_kib: u64 },
}

impl Deed {
    fn words(&self) -> String {
        match self {
            Self::Write { kib, length_kib, pattern } => {
                format!("write -q -P {pattern} {kib}k {length_kib}k")
            }
            Self::Zero { kib, length_kib } => format!("write -q -z {kib}k {length_kib}k"),
            Self::Discard { kib, length_kib } => format!("discard -q {kib}k {length_kib}k"),
        }
    }
}

fn deed() -> impl Strategy<Value = Deed> {
    // Most at the beginning, so that they meet; some where the second table and the disk's end are.
    let place = prop_oneof![4 => 0..600_u64, 1 => 524_200..524_400_u64, 1 => Just(DISK_MIB * 1024 - 300)];
    (place, 1..300_u64, 0..4_u8, 0..8_u8).prop_map(|(kib, length_kib, pattern, kind)| match kind {
        0 => Deed::Zero { kib, length_kib },
        1 => Deed::Discard { kib, length_kib },
        _ => Deed::Write { kib, length_kib, pattern },
    })
}

/// Layers on each other, each with what was done to it, frozen.
fn chain(directory: &Path, layers: &[Vec<Deed>]) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for (number, deeds) in layers.iter().enumerate() {
        let path = directory.join(format!("{number}.qcow2"));
        let size = format!("{DISK_MIB}M");
        let text = path.to_str().expect("path").to_owned();
        match paths.last() {
            None => run("qemu-img", &["create", "-q", "-f", "qcow2", &text, &size]),
            Some(_) => {
                let below = format!("{}.qcow2", number - 1);
                let below = Below { path: &below, format: "qcow2" };
                overlay::create(&path, DISK_MIB << 20, below, None).expect("layer");
            }
        }
        let words: Vec<String> = deeds.iter().flat_map(|deed| ["-c".to_owned(), deed.words()]).collect();
        let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
        arguments.extend(words.iter().map(String::as_str));
        arguments.push(&text);
        run("qemu-io", &arguments);
        paths.push(path);
    }
    paths
}

fn merged(directory: &Path, from: &[PathBuf], below: Option<&str>) -> PathBuf {
    let to = directory.join("merged.qcow2");
    let backing = below.map(|below| BackingFile { relative_path: below.into(), format: PartFormat::Qcow2 });
    let work = Merging { from: from.to_vec(), to: to.clone(), backing };
    merge(&work, &Pace::new(u64::MAX)).expect("merged");
    to
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn what_qemu_reads_of_the_merged_layer_is_what_it_reads_of_the_layers(
        layers in prop::collection::vec(prop::collection::vec(deed(), 1..6), 2..6),
        from in 0..3_usize,
    ) {
        let directory = tempfile::tempdir().expect("directory");
        let paths = chain(directory.path(), &layers);
        let from = from.min(paths.len() - 2);
        let below = from.checked_sub(1).map(|below| format!("{below}.qcow2"));
        let new = merged(directory.path(), &paths[from..], below.as_deref());
        let (new, old) = (new.to_str().expect("path"), paths[paths.len() - 1].to_str().expect("path"));
        run("qemu-img", &["check", "-q", "-f", "qcow2", new]);
        run("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", new, old]);
        let data = measure(&paths[from..]).expect("measured");
        let length = std::fs::metadata(new).expect("there").len();
        prop_assert!(length <= data + 6 * CLUSTER_BYTES, "{length} for {data}");
        let mode = std::fs::metadata(new).expect("there").permissions().mode() & 0o777;
        prop_assert_eq!(mode, FROZEN_MODE);
    }
}

#[test]
fn more_clusters_than_one_cluster_of_counts_stands_for_are_counted() {
    let directory = tempfile::tempdir().expect("directory");
    let write = |mib: u64| Deed::Write { kib: mib << 10, length_kib: 200 << 10, pattern: 7 };
    // Files that are long and mostly holes: the counts are made for their length.
    let paths = chain(directory.path(), &[vec![write(0), write(200)], vec![write(390)]]);
    for path in &paths {
        let file = OpenOptions::new().write(true).open(path).expect("opened");
        file.set_len(3 * REFCOUNT_STEP * CLUSTER_BYTES).expect("longer");
    }
    let new = merged(directory.path(), &paths, None);
    run("qemu-img", &["check", "-q", "-f", "qcow2", new.to_str().expect("path")]);
    let (new, old) = (new.to_str().expect("path"), paths[1].to_str().expect("path"));
    run("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", new, old]);
}

#[test]
fn a_layer_whose_tables_lie_is_refused_and_nothing_is_left() {
    let directory = tempfile::tempdir().expect("directory");
    let one = || vec![Deed::Write { kib: 0, length_kib: 64, pattern: 1 }];
    let paths = chain(directory.path(), &[one(), one()]);
    let file = OpenOptions::new().read(true).write(true).open(&paths[1]).expect("opened");
    let to = directory.path().join("merged.qcow2");
    let work = Merging { from: paths.clone(), to: to.clone(), backing: None };
    let head = {
        let mut head = vec![0; 104];
        file.read_exact_at(&mut head, 0).expect("head");
        head
    };
    let try_it = |at: u64, bytes: &[u8]| {
        file.write_all_at(bytes, at).expect("written");
        let error = merge(&work, &Pace::new(u64::MAX)).expect_err("it lies");
        assert!(error.to_string().contains("1.qcow2"), "{error}");
        assert!(!to.exists());
        file.write_all_at(&head, 0).expect("put back");
    };
    try_it(0, b"nope");
    try_it(4, &2_u32.to_be_bytes());
    try_it(20, &9_u32.to_be_bytes());
    try_it(36, &0_u32.to_be_bytes());
    try_it(40, &(1_u64 << 50).to_be_bytes());
    try_it(72, &4_u64.to_be_bytes());
    try_it(FIRST_TABLE * CLUSTER_BYTES, &((1_u64 << 40) | ENTRY_COPIED).to_be_bytes());
    try_it(FIRST_TABLE * CLUSTER_BYTES, &(512_u64 | ENTRY_COPIED).to_be_bytes());
}

#[test]
fn work_that_is_broken_off_leaves_nothing() {
    let directory = tempfile::tempdir().expect("directory");
    let one = || vec![Deed::Write { kib: 0, length_kib: 640, pattern: 1 }];
    let paths = chain(directory.path(), &[one(), one()]);
    let to = directory.path().join("merged.qcow2");
    let pace = Pace::new(u64::MAX);
    pace.break_off();
    let work = Merging { from: paths, to: to.clone(), backing: None };
    assert!(matches!(merge(&work, &pace), Err(MergeError::BrokenOff(_))));
    assert!(!to.exists());
}
