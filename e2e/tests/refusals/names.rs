//! Names that nothing has, names that are taken, sizes that no host has, user data that is none. No guest is booted.

use anyhow::{Context, Result, ensure};
use berth_e2e::testing::up;

use super::{Stand, Wanted, refused, wanted};

const SMALL: [&str; 4] = ["--memory", "192MiB", "--disk", "256MiB"];

fn create<'a>(name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    ["vm", "create", name, "--stopped"].iter().chain(more).copied().collect()
}

#[test]
fn what_is_not_there_and_what_is_taken_is_said_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    cluster.berth.run(&create("books", &[&["--image", "probe"], &SMALL[..]].concat()))?;
    let before = Stand::of(&cluster)?;
    let unknown = |noun, value| wanted("not-found", 4, noun, value, "an existing ");
    let taken = |value| wanted("already-exists", 5, "name", value, "a name that no other");
    let probe = guest_probe::image::GuestImage::locate()?;
    let kernel = probe.kernel.to_str().context("path")?;
    let initrd = probe.initrd.to_str().context("path")?;
    let cases: &[(Vec<&str>, Wanted<'_>)] = &[
        (create("a", &["--image", "probe", "--host", "h9"]), unknown("host", "h9")),
        (vec!["host", "show", "h9"], unknown("host", "h9")),
        (create("nowhere/a", &["--image", "probe"]), unknown("segment", "nowhere")),
        (create("a", &["--image", "nothing"]), unknown("image", "nothing")),
        (vec!["image", "show", "nothing"], unknown("image", "nothing")),
        (vec!["image", "delete", "nothing"], unknown("image", "nothing")),
        (vec!["vm", "start", "nobody"], unknown("vm", "default/nobody")),
        (vec!["vm", "migrate", "nobody"], unknown("vm", "default/nobody")),
        (vec!["snapshot", "restore", "books", "never"], unknown("snapshot", "never")),
        (vec!["snapshot", "delete", "books", "never"], unknown("snapshot", "never")),
        (vec!["snapshot", "create", "nobody", "--name", "x"], unknown("vm", "default/nobody")),
        (create("books", &["--image", "probe"]), taken("books")),
        (vec!["segment", "create", "default"], taken("default")),
        (vec!["image", "import", "--name", "probe", "--kernel", kernel, "--initrd", initrd], taken("probe")),
        (create("Books_1", &["--image", "probe"]), wanted("invalid-input", 2, "name", "Books_1", "a-z")),
        (
            create("a", &["--image", "probe", "--pool", "moon"]),
            wanted("invalid-input", 2, "pool", "moon", "default, local"),
        ),
        (
            create("a", &["--image", "probe", "--cpu-model", "Cray"]),
            wanted("invalid-input", 2, "cpu_model", "Cray", "one that a host offers"),
        ),
    ];
    for (words, wanted) in cases {
        refused(&cluster, words, *wanted)?;
    }
    before.unchanged(|| Stand::of(&cluster))?;
    cluster.down()
}

#[test]
fn sizes_that_no_host_has_are_refused_with_what_there_is() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let before = Stand::of(&cluster)?;
    let sized = |option, size| create("a", &["--image", "probe", option, size]);
    let invalid = |field: &'static str, value: &'static str, expected| {
        wanted("invalid-input", 2, field, value, expected)
    };
    for (words, wanted) in [
        (sized("--memory", "0MiB"), invalid("memory_mib", "0", "at least 32")),
        (sized("--memory", "-1GiB"), invalid("memory", "-1GiB", "a size like 512MiB")),
        (sized("--memory", "1"), invalid("memory", "1", "a size like 512MiB")),
        (sized("--memory", "9999GiB"), invalid("memory_mib", "10238976", "what the largest host can give")),
        (sized("--disk", "0MiB"), invalid("disk_mib", "0", "at least 1")),
        (sized("--disk", "-1GiB"), invalid("disk", "-1GiB", "a size like 512MiB")),
        (sized("--disk", "9999TiB"), invalid("disk_mib", "10484711424", "the size of the largest pool")),
        (sized("--data-disk", "0MiB"), invalid("data_disks_mib.0", "0", "1 to")),
        (sized("--data-disk", "3TiB"), invalid("data_disks_mib.0", "3145728", "what its other disks leave")),
        (sized("--vcpus", "0"), invalid("vcpus", "0", "1 to 255")),
        (sized("--vcpus", "-3"), invalid("vcpus", "-3", "a number in 0")),
    ] {
        refused(&cluster, &words, wanted)?;
    }
    before.unchanged(|| Stand::of(&cluster))?;
    cluster.down()
}

#[test]
fn user_data_that_cloud_init_could_not_read_is_refused_by_its_line() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let before = Stand::of(&cluster)?;
    let long = format!("#cloud-config\nfinal_message: {}\n", "x".repeat(20_000));
    for (text, value, expected) in [
        ("hostname: books\n", "hostname: books", "'#cloud-config'"),
        ("", "", "'#cloud-config'"),
        ("#cloud-config\n- a\n- list\n", "#cloud-config", "a YAML mapping"),
        ("#cloud-config\nhostname: [books\n", "hostname: [books", "valid YAML"),
        ("#cloud-config\nruncmd:\n\t- tabs\n", "- tabs", "valid YAML"),
    ] {
        let path = folder.path().join("user-data");
        std::fs::write(&path, text)?;
        let words = create("a", &["--image", "probe", "--user-data", path.to_str().context("path")?]);
        refused(&cluster, &words, wanted("invalid-input", 2, "user_data", value, expected))?;
    }
    let path = folder.path().join("long");
    std::fs::write(&path, long)?;
    let path = path.to_str().context("path")?;
    for (path, expected) in [(path, "at most 16384 bytes"), ("/nonexistent", "a text file that can be read")]
    {
        let words = create("a", &["--image", "probe", "--user-data", path]);
        let refusal = refused(&cluster, &words, wanted("invalid-input", 2, "user-data", path, expected))?;
        ensure!(refusal.problem["request_id"].is_null(), "what is known here is not asked of the manager");
    }
    before.unchanged(|| Stand::of(&cluster))?;
    cluster.down()
}
