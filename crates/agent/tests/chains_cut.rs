//! A merge of layers that is cut off, by a crash or by the power, at each of its steps: whoever starts next finds a VM whose
//! disk and snapshots hold what they held, and carries the merge out.
//!
//! The records are each written whole and in a known order, so the states that a cut can leave are a list. Each is put
//! together from what was before and what was after, and an agent is started on it. No guest is needed for that.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use berth_api::agent::{TaskOutput, TaskSpec};
use berth_model::SnapshotId;
use host::{LONG, TestHost, TestVm, definition, layer, snapshot};
use serde_json::{Value, json};

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("record")).expect("JSON")
}

fn copy_tree(from: &Path, to: &Path) {
    let words = ["-a", from.to_str().expect("path"), to.to_str().expect("path")];
    // The agent may be giving a layer's hashes their name at this moment.
    for _ in 0..5 {
        let _ = std::fs::remove_dir_all(to);
        if Command::new("cp").args(words).status().expect("cp").success() {
            return;
        }
    }
    run("cp", &words);
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("entry").file_name().into_string().expect("name")).collect();
    names.sort();
    names
}

/// A VM at rest, and what its disk and its snapshots hold.
struct Story {
    host: TestHost,
    vm: TestVm,
    images: tempfile::TempDir,
    /// Each with the file that has what it holds.
    taken: Vec<(SnapshotId, PathBuf)>,
    now: PathBuf,
}

impl Story {
    async fn begin() -> Self {
        let host = TestHost::start().await;
        let definition = definition(64);
        host.take_image(&definition.image).await;
        let vm = TestVm { id: definition.id.clone(), definition };
        host.task(&vm.id, TaskSpec::PrepareVm { definition: vm.boxed() }).await.expect("prepared");
        let images = tempfile::tempdir().expect("directory");
        let now = images.path().join("now.raw");
        let disk = std::fs::File::create(&now).expect("file");
        disk.set_len(vm.definition.spec.disk_mib << 20).expect("length");
        Self { host, vm, images, taken: Vec::new(), now }
    }

    fn directory(&self) -> PathBuf {
        self.host.vm_directory(&self.vm.id)
    }

    fn chain(&self) -> Vec<String> {
        serde_json::from_value(read(&self.directory().join("vm.json"))["chain"].clone()).expect("chain")
    }

    fn manifest(&self, snapshot: &SnapshotId) -> PathBuf {
        self.directory().join("snapshots").join(snapshot.as_str()).join("snapshot.json")
    }

    /// A chain as QEMU's tools open it.
    fn opened(&self, chain: &[String]) -> String {
        let file = |layer: &String| {
            let path = self.directory().join("layers").join(format!("{layer}.qcow2"));
            json!({"driver": "file", "filename": path})
        };
        let on =
            |below: Value, layer: &String| json!({"driver": "qcow2", "file": file(layer), "backing": below});
        format!("json:{}", chain.iter().fold(Value::Null, on))
    }

    /// The guest writes, in its stead.
    fn write(&self, words: &[&str]) {
        let top =
            self.directory().join("layers").join(format!("{}.qcow2", self.chain().last().expect("top")));
        // Only this layer is opened: what is written is in whole clusters.
        let mut options = json!({"driver": "qcow2", "file": {"driver": "file", "filename": top}});
        options["backing"] = Value::Null;
        let options = format!("json:{options}");
        let words = words.iter().flat_map(|word| ["-c", word]);
        run("qemu-io", &words.clone().chain([options.as_str()]).collect::<Vec<_>>());
        let now = self.now.to_str().expect("path");
        run("qemu-io", &["-f", "raw"].into_iter().chain(words).chain([now]).collect::<Vec<_>>());
    }

    async fn take(&mut self) {
        let id = snapshot();
        let spec = TaskSpec::TakeSnapshot { snapshot: id.clone(), new_top: layer(), next: None };
        let taken = self.host.task(&self.vm.id, spec).await.expect("taken");
        assert!(matches!(taken, TaskOutput::Snapshot { .. }));
        let held = self.images.path().join(format!("{id}.raw"));
        run("cp", &["--sparse=always", self.now.to_str().expect("path"), held.to_str().expect("path")]);
        self.taken.push((id, held));
    }

    async fn until_merged(&self, length: usize) {
        let began = Instant::now();
        let merging = |story: &Self| {
            let unfinished =
                names(&story.directory().join("layers")).iter().any(|name| name.ends_with("unfinished"));
            unfinished || story.chain().len() != length || story.directory().join("merge.json").exists()
        };
        while merging(self) {
            assert!(began.elapsed() < LONG, "{:?} is not merged", self.chain());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// All that is there is needed and holds what it held.
    fn verify(&self, when: &str) {
        let same = |chain: &[String], held: &Path| {
            let (chain, held) = (self.opened(chain), held.to_str().expect("path").to_owned());
            run("qemu-img", &["compare", "-q", "-F", "raw", &chain, &held]);
        };
        let mut needed = self.chain();
        same(&needed, &self.now);
        for (snapshot, held) in &self.taken {
            let manifest = read(&self.manifest(snapshot));
            let layers: Vec<String> = serde_json::from_value(manifest["layers"].clone()).expect("layers");
            same(&layers, held);
            needed.extend(layers);
        }
        let mut needed: Vec<String> = needed.into_iter().map(|layer| format!("{layer}.qcow2")).collect();
        needed.sort();
        needed.dedup();
        assert_eq!(names(&self.directory().join("layers")), needed, "{when}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_that_is_cut_off_at_any_step_is_carried_out_by_the_next_agent() {
    let mut story = Story::begin().await;
    for words in [
        ["write -P 1 0 1M", "write -P 1 8M 64k"],
        ["write -P 2 512k 1M", "write -P 2 200M 128k"],
        ["write -P 3 1M 64k", "write -z 640k 64k"],
        ["write -P 4 64k 128k", "write -z 200M 64k"],
    ] {
        story.write(&words);
        story.take().await;
    }
    story.write(&["write -P 5 3M 64k"]);
    story.verify("before");

    let aside = tempfile::tempdir().expect("directory");
    let (before, after) = (aside.path().join("before"), aside.path().join("after"));
    let (gone, _) = story.taken.remove(1);
    copy_tree(&story.directory(), &before);
    std::fs::remove_dir_all(before.join("snapshots").join(gone.as_str())).expect("removed");
    let old_chain = story.chain();
    story.host.task(&story.vm.id, TaskSpec::DeleteSnapshot { snapshot: gone }).await.expect("deleted");
    story.until_merged(4).await;
    story.verify("after");
    copy_tree(&story.directory(), &after);

    let chain = story.chain();
    let result = chain.iter().find(|layer| !old_chain.contains(layer)).expect("the new layer").clone();
    let run: Vec<String> = old_chain.iter().filter(|layer| !chain.contains(layer)).cloned().collect();
    assert_eq!(run, old_chain[1..=2]);
    let layer_file = |layer: &String| Path::new("layers").join(format!("{layer}.qcow2"));
    let within = |path: PathBuf| path.strip_prefix(story.directory()).expect("inside").to_owned();
    let manifests: Vec<PathBuf> =
        story.taken.iter().map(|(taken, _)| within(story.manifest(taken))).collect();
    let steps = 4 + manifests.len() + run.len();
    for cut in 0..=steps {
        let there = story.directory();
        copy_tree(&before, &there);
        let take_over = |file: &Path| run_copy(&after.join(file), &there.join(file));
        if cut == 0 {
            let half = std::fs::read(after.join(layer_file(&result))).expect("read");
            let unfinished = there.join("layers").join(format!("{result}.qcow2.unfinished"));
            std::fs::write(unfinished, &half[..half.len() / 2]).expect("written");
        }
        if cut >= 1 {
            take_over(&layer_file(&result));
        }
        if cut >= 2 {
            let journal = json!({"result": result, "run": run});
            std::fs::write(there.join("merge.json"), journal.to_string()).expect("written");
        }
        if cut >= 3 {
            take_over(Path::new("vm.json"));
        }
        for (number, manifest) in manifests.iter().enumerate() {
            if cut >= 4 + number {
                take_over(manifest);
            }
        }
        for (number, layer) in run.iter().enumerate() {
            if cut > 4 + manifests.len() + number {
                std::fs::remove_file(there.join(layer_file(layer))).expect("removed");
            }
        }
        story.host.replace_agent().await;
        story.until_merged(4).await;
        story.verify(&format!("cut after step {cut}"));
    }
}

fn run_copy(from: &Path, to: &Path) {
    run("cp", &["-a", "--remove-destination", from.to_str().expect("path"), to.to_str().expect("path")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_clone_has_under_a_name_of_its_own_is_never_touched() {
    let mut story = Story::begin().await;
    let clone = tempfile::tempdir_in(story.host.pool()).expect("directory");
    for pattern in 1..=4 {
        story.write(&[&format!("write -P {pattern} {pattern}M 64k")]);
        story.take().await;
    }
    let frozen = story.chain()[..4].to_vec();
    let content = |directory: &Path| -> Vec<Vec<u8>> {
        let file = |layer: &String| std::fs::read(directory.join(format!("{layer}.qcow2"))).expect("there");
        frozen.iter().map(file).collect()
    };
    for layer in &frozen {
        let name = format!("{layer}.qcow2");
        let from = story.directory().join("layers").join(&name);
        std::fs::hard_link(from, clone.path().join(&name)).expect("linked");
    }
    let held = content(clone.path());
    // All but the last snapshot go, and what they stood for is needed by the clone alone.
    for (snapshot, _) in story.taken.drain(..3).collect::<Vec<_>>() {
        story.host.task(&story.vm.id, TaskSpec::DeleteSnapshot { snapshot }).await.expect("deleted");
    }
    for pattern in 5..=20 {
        story.write(&[&format!("write -P {pattern} {pattern}M 64k")]);
        story.take().await;
        assert!(story.chain().len() <= 16);
    }
    let began = Instant::now();
    while story.chain().len() > 12 {
        assert!(began.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    story.until_merged(story.chain().len()).await;
    story.verify("merged");
    assert_eq!(content(clone.path()), held);
}
