//! Targets that can't take a VM: their QEMU has not its CPU, they have not its pool, their QEMU dies.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use berth_e2e::Cluster;
use berth_e2e::testing::{Pool, guest_in, up};

use super::running::{Worker, other_than};
use super::{Stand, refused, wanted};

/// What a QEMU that dies says last.
const LAST_WORDS: &str = "cannot set up guest memory 'ram': Cannot allocate memory";

/// The QEMU that the cluster would use.
fn real_qemu() -> String {
    std::env::var("BERTH_QEMU").unwrap_or_else(|_| "/usr/bin/qemu-system-x86_64".to_owned())
}

fn program(path: PathBuf, text: &str) -> Result<PathBuf> {
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// A QEMU that says what it can do, and dies with a machine.
fn dying(folder: &Path) -> Result<PathBuf> {
    let real = real_qemu();
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *\"-machine none\"*) exec {real} \"$@\";; esac\n\
         echo \"qemu: {LAST_WORDS}\" >&2\nexit 1\n"
    );
    program(folder.join("qemu-dying"), &text)
}

/// A QEMU that calls one CPU model by another name.
fn without(folder: &Path, model: &str) -> Result<PathBuf> {
    let real = real_qemu();
    let text = format!(
        "#!/bin/bash\ncase \"$*\" in *\"-machine none\"*) ;; *) exec {real} \"$@\";; esac\nwords=()\n\
         for word in \"$@\"; do\n\
         case \"$word\" in socket,id=qmp,fd=*) fd=${{word##*=}}; word=stdio,id=qmp;; esac\n\
         words+=(\"$word\")\ndone\n\
         {real} \"${{words[@]}}\" <&\"$fd\" | sed -u 's/\"{model}/\"Absent/g' >&\"$fd\"\n"
    );
    program(folder.join("qemu-without"), &text)
}

/// Starts a host's agent anew, with another QEMU when one is given.
pub fn restart(cluster: &Cluster, host: &str, qemu: Option<&Path>) -> Result<()> {
    cluster.daemon(host)?.kill()?;
    let dir = cluster.dir().to_str().context("path")?;
    let mut command = cluster.berth.command(&["up", "--dir", dir, "--detach"]);
    if let Some(qemu) = qemu {
        command.env("BERTH_QEMU", qemu);
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Changes a host's configuration by hand.
pub fn edit(cluster: &Cluster, host: &str, change: impl FnOnce(&str) -> String) -> Result<()> {
    let path = cluster.dir().join("hosts").join(format!("{host}.toml"));
    let text = std::fs::read_to_string(&path)?;
    let changed = change(&text);
    ensure!(changed != text, "nothing changed in {}", path.display());
    Ok(std::fs::write(&path, changed)?)
}

fn without_local_pool(text: &str) -> String {
    let mut tables = text.split("[[pools]]").map(str::to_owned).collect::<Vec<_>>();
    if let Some(at) = tables.iter().position(|table| table.contains("name = \"local\"")) {
        let rest = tables.remove(at);
        // The last table of a list is followed by what is not of it.
        if let Some(next) = rest.find("\n[") {
            tables.last_mut().expect("what stands before the pools").push_str(&rest[next..]);
        }
    }
    tables.join("[[pools]]")
}

#[test]
fn a_target_without_the_cpu_the_pool_or_a_working_qemu_leaves_the_vm_where_it_is() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 2)?;
    let worker = Worker::begin(guest_in(&cluster, "books", Pool::Local)?)?;
    let target = other_than(&cluster.host_of("books")?);
    let vm = cluster.vm("books")?;
    let model = vm["spec"]["cpu_model"].as_str().context("a VM without a CPU model")?;
    let migrate = ["vm", "migrate", "books", "--to", target];
    let placement = wanted("no-placement", 1, "target", target, "a host that can take the VM");
    let before = Stand::of(&cluster)?.but_image_files();
    let unchanged = || before.unchanged(|| Ok(Stand::of(&cluster)?.but_image_files()));

    restart(&cluster, target, Some(&without(folder.path(), model)?))?;
    let refusal = refused(&cluster, &migrate, placement)?;
    ensure!(refusal.text.contains(&format!("CPU model {model}")), "{}", refusal.text);
    unchanged().context("without the CPU model")?;

    restart(&cluster, target, Some(&dying(folder.path())?))?;
    let dead = wanted("hypervisor", 1, "host", target, "a host whose QEMU");
    let refusal = refused(&cluster, &migrate, dead)?;
    ensure!(refusal.text.contains(LAST_WORDS), "{}", refusal.text);
    unchanged().context("with a QEMU that dies")?;
    let create = [
        "vm", "create", "new", "--image", "probe", "--memory", "192MiB", "--disk", "256MiB", "--host", target,
    ];
    let refusal = refused(&cluster, &create, dead)?;
    ensure!(refusal.text.contains(LAST_WORDS), "{}", refusal.text);
    unchanged().context("a VM that never started")?;

    edit(&cluster, target, without_local_pool)?;
    restart(&cluster, target, None)?;
    let refusal = refused(&cluster, &migrate, placement)?;
    ensure!(refusal.text.contains("no access to pool local"), "{}", refusal.text);
    unchanged().context("without the pool")?;
    worker.is_well(&cluster, "books")?;
    cluster.down()
}
