//! Two teams in two segments, on real processes: each operates its own VMs, and for each the other's are not there.
//! No guest is booted: what is tested is who may, not what then happens.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use berth_e2e::testing::up;
use berth_e2e::{Berth, Cluster, Refusal};
use serde_json::Value;

const SMALL: [&str; 6] = ["--image", "probe", "--memory", "64MiB", "--disk", "64MiB"];

/// A cluster with segments `accounting` and `engineering`, a VM in each, and a team for each.
struct Site {
    cluster: Cluster,
    folder: tempfile::TempDir,
}

impl Site {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let site = Self { cluster: up(folder.path(), 1)?, folder };
        for (segment, team, vm) in
            [("accounting", "ledger", "accounting/books"), ("engineering", "builders", "engineering/forge")]
        {
            site.admin(&["segment", "create", segment])?;
            site.admin(&["team", "create", team])?;
            site.admin(&[&["vm", "create", vm, "--stopped"], &SMALL[..]].concat())?;
        }
        Ok(site)
    }

    fn admin(&self, words: &[&str]) -> Result<Value> {
        self.cluster.berth.run(words)
    }

    /// A user with a token that has all of its rights.
    fn user(&self, name: &str, teams: &[&str]) -> Result<User> {
        self.admin(&["user", "create", name])?;
        for team in teams {
            self.admin(&["team", "update", team, "--add-member", name])?;
        }
        let made = self.admin(&["token", "create", "--user", name])?;
        self.with_token(name, &made)
    }

    /// The binary as the holder of this new token uses it.
    fn with_token(&self, name: &str, made: &Value) -> Result<User> {
        let secret = made["secret"].as_str().context("no secret was shown")?;
        let path = self.folder.path().join(format!("{name}.toml"));
        let admins = std::fs::read_to_string(self.cluster.dir().join("client.toml"))?;
        let url = admins.lines().find(|line| line.starts_with("url")).context("no address")?;
        let ca = admins.lines().find_map(|line| line.strip_prefix("ca = ")).context("no CA")?;
        let ca = self.cluster.dir().join(ca.trim_matches('"'));
        std::fs::write(&path, format!("{url}\nca = \"{}\"\ntoken = \"{secret}\"\n", ca.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let berth = Berth::new(self.cluster.berth.binary()).with_config(&path);
        Ok(User { berth, path })
    }
}

struct User {
    berth: Berth,
    path: PathBuf,
}

impl User {
    fn run(&self, words: &[&str]) -> Result<Value> {
        self.berth.run(words).with_context(|| self.path.display().to_string())
    }

    fn refused(&self, words: &[&str], code: &str, exit: i32) -> Result<Refusal> {
        let refusal = self.berth.refuses(words)?;
        ensure!(
            refusal.code() == code && refusal.exit_code == exit,
            "{words:?}: wanted {code} and exit code {exit}, got {} and {}",
            refusal.exit_code,
            refusal.text
        );
        Ok(refusal)
    }
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str()).collect()
}

/// The words with one name in the place of another, and the answer's traces of it taken out.
fn without(refusal: &Refusal, name: &str) -> Value {
    let mut problem = refusal.problem.clone();
    if let Some(fields) = problem.as_object_mut() {
        fields.remove("request_id");
    }
    let text = problem.to_string().replace(name, "NAME");
    serde_json::from_str(&text).unwrap_or_default()
}

#[test]
fn a_team_operates_the_vms_of_its_segment_and_for_it_there_are_no_others() -> Result<()> {
    let site = Site::new()?;
    let ada = site.user("ada", &["ledger"])?;
    ensure!(names(&ada.run(&["vm", "list"])?).is_empty(), "without a grant there is nothing to see");
    let grant = ["grant", "create", "--team", "ledger", "--role", "operator", "--segment", "accounting"];
    let granted = site.admin(&[&grant[..], &["--until", "2126-12-31T18:00Z"]].concat())?;

    ensure!(names(&ada.run(&["vm", "list"])?) == ["books"], "just its own");
    ada.run(&["vm", "show", "accounting/books"])?;
    ada.run(&["snapshot", "create", "accounting/books", "--name", "closing"])?;
    ada.run(&["snapshot", "restore", "accounting/books", "closing"])?;
    ensure!(names(&ada.run(&["segment", "list"])?) == ["accounting"], "a name of another segment leaked");
    ensure!(names(&ada.run(&["host", "list"])?).is_empty(), "hosts are not a segment's");
    let operations = ada.run(&["operation", "list"])?.to_string();
    ensure!(operations.contains("accounting/books") && !operations.contains("forge"), "{operations}");
    as_a_person(&ada)?;

    let said = ada.run(&["can-i", "snapshot.restore", "accounting/books"])?;
    let id = granted["id"].as_str().context("a grant")?;
    ensure!(said["reason"].as_str().is_some_and(|reason| reason.contains(id)), "{said}");
    ensure!(ada.berth.refuses(&["can-i", "vm.start", "engineering/forge"])?.exit_code == 3, "it can't");

    foreign_is_as_absent(&ada)?;
    // What it sees and may not do is said so.
    let refusal = ada.refused(&["vm", "delete", "accounting/books"], "not-allowed", 3)?;
    ensure!(refusal.text.contains("configurator"), "it does not say what would allow it: {}", refusal.text);
    site.admin(&["grant", "delete", id])?;
    ada.berth.refuses(&["vm", "show", "accounting/books"])?;
    ensure!(names(&ada.run(&["vm", "list"])?).is_empty(), "a grant that is taken away counts no longer");
    site.cluster.down()
}

/// Tables need names of things that may not be seen: no command fails for it.
fn as_a_person(user: &User) -> Result<()> {
    for words in [
        &["whoami"][..],
        &["what-can"],
        &["vm", "list"],
        &["vm", "show", "accounting/books"],
        &["segment", "list"],
        &["segment", "show", "accounting"],
        &["segment", "delete", "accounting", "--dry-run"],
        &["host", "list"],
        &["image", "list"],
        &["snapshot", "list", "accounting/books"],
        &["operation", "list"],
        &["migration", "list"],
        &["team", "list"],
        &["team", "show", "ledger"],
        &["role", "list"],
        &["role", "show", "operator"],
        &["grant", "list"],
        &["token", "list"],
        &["approval", "list"],
    ] {
        let output = user.berth.command(words).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let is_dry = words.contains(&"--dry-run");
        // What is only tried and not allowed is refused for that, and for no lookup on the way.
        ensure!(output.status.success() || (is_dry && text.contains("policy")), "{words:?}: {text}");
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(!said.contains("forge") && !said.contains("engineering"), "{words:?} leaks: {said}");
    }
    Ok(())
}

/// What is another's and what nobody has get the same answer.
fn foreign_is_as_absent(user: &User) -> Result<()> {
    let id_of_nothing = "vm-0000000000000000";
    for words in [
        &["vm", "show", "VM"][..],
        &["vm", "start", "VM"],
        &["vm", "delete", "VM", "--force"],
        &["vm", "migrate", "VM"],
        &["vm", "protect", "VM"],
        &["snapshot", "list", "VM"],
        &["snapshot", "create", "VM", "--name", "x"],
        &["snapshot", "restore", "VM"],
        &["vm", "list", "--segment", "SEGMENT"],
        &["segment", "show", "SEGMENT"],
        &["segment", "delete", "SEGMENT"],
        &["grant", "list", "--segment", "SEGMENT"],
        &["token", "create", "--segment", "SEGMENT"],
    ] {
        let ask = |vm: &str, segment: &str| {
            let said: Vec<&str> = words
                .iter()
                .map(|word| match *word {
                    "VM" => vm,
                    "SEGMENT" => segment,
                    other => other,
                })
                .collect();
            let refusal = user.berth.refuses(&said)?;
            let name = if words.contains(&"VM") { vm } else { segment };
            anyhow::Ok((refusal.exit_code, without(&refusal, name)))
        };
        let foreign = ask("engineering/forge", "engineering")?;
        for absent in [ask("engineering/ghost", "nothing")?, ask("nowhere/ghost", "nothing")?] {
            ensure!(foreign == absent, "{words:?}: foreign {foreign:?}, absent {absent:?}");
        }
        let by_id = ask(id_of_nothing, "seg-0000000000000000")?;
        ensure!(foreign == by_id, "{words:?}: foreign {foreign:?}, absent by id {by_id:?}");
        ensure!(foreign.0 == 3 || foreign.0 == 4, "{words:?} ended with {}", foreign.0);
    }
    Ok(())
}

#[test]
fn nobody_gives_what_it_has_not() -> Result<()> {
    let site = Site::new()?;
    let lead = site.user("lead", &["ledger"])?;
    site.user("bo", &[])?;
    site.admin(&["role", "create", "lead", "--copy-of", "operator", "--action", "grant.manage,grant.view"])?;
    site.admin(&["grant", "create", "--user", "lead", "--role", "lead", "--segment", "accounting"])?;

    let give = |role, segment| ["grant", "create", "--user", "bo", "--role", role, "--segment", segment];
    lead.run(&give("operator", "accounting"))?;
    let refusal = lead.refused(&give("configurator", "accounting"), "not-allowed", 3)?;
    ensure!(refusal.text.contains("only what one holds oneself"), "{}", refusal.text);
    lead.refused(&give("viewer", "engineering"), "not-allowed", 3)?;
    lead.refused(&["grant", "create", "--user", "bo", "--role", "viewer"], "not-allowed", 3)?;
    lead.refused(&["team", "update", "builders", "--add-member", "lead"], "not-allowed", 3)?;
    lead.refused(&["role", "update", "lead", "--action", "vm.delete"], "not-allowed", 3)?;
    lead.refused(&["token", "create", "--user", "admin"], "not-allowed", 3)?;
    ensure!(site.admin(&["grant", "list", "--user", "bo"])?.as_array().map(Vec::len) == Some(1), "one grant");
    // What is too long is told by the option.
    let ask = ["grant", "request", "--role", "admin", "--for", "999d", "--reason", "x"];
    ensure!(lead.refused(&ask, "invalid-input", 2)?.problem["field"] == "for", "not the option");
    site.cluster.down()
}

#[test]
fn a_production_vm_is_restored_by_two_people_and_a_wished_role_is_given_by_another() -> Result<()> {
    let site = Site::new()?;
    let (ada, eve) = (site.user("ada", &["ledger"])?, site.user("eve", &[])?);
    site.admin(&["grant", "create", "--team", "ledger", "--role", "operator", "--segment", "accounting"])?;
    site.admin(&[
        "grant",
        "create",
        "--user",
        "eve",
        "--role",
        "security-officer",
        "--segment",
        "accounting",
    ])?;
    ada.run(&["snapshot", "create", "accounting/books", "--name", "closing"])?;
    ada.refused(&["vm", "update", "accounting/books", "--class", "standard"], "not-allowed", 3)?;
    site.admin(&["vm", "update", "accounting/books", "--class", "production"])?;

    let restore = ["snapshot", "restore", "accounting/books", "closing"];
    let needed = ada.refused(&restore, "approval-needed", 3)?;
    let id = needed.problem["value"].as_str().context("no approval is named")?.to_owned();
    ensure!(needed.text.contains(&format!("berth approval approve {id}")), "{}", needed.text);
    ada.refused(&["approval", "approve", &id], "not-allowed", 3)?;
    let listed = eve.run(&["approval", "list"])?;
    ensure!(listed[0]["id"] == id.as_str() && listed[0]["requester"] == "ada", "{listed}");
    eve.run(&["approval", "show", &id])?;
    eve.run(&["approval", "approve", &id])?;
    // Another request is not approved by it, and this one only once.
    let other = ["snapshot", "restore", "accounting/books", "closing", "--no-undo"];
    ada.refused(&other, "approval-needed", 3)?;
    ada.run(&restore)?;
    ada.refused(&restore, "approval-needed", 3)?;

    let wish = ["grant", "request", "--role", "configurator", "--segment", "accounting", "--for", "4h"];
    let wished = ada.run(&[&wish[..], &["--reason", "year's end"]].concat())?;
    let id = wished["id"].as_str().context("an approval")?;
    // Who may decide and has not the role itself can't give it.
    eve.refused(&["approval", "approve", id], "not-allowed", 3)?;
    site.admin(&["approval", "approve", id])?;
    ada.run(&[&["vm", "create", "accounting/more", "--stopped"], &SMALL[..]].concat())?;
    site.cluster.down()
}

#[test]
fn a_quota_refuses_before_anything_is_done_and_a_token_has_only_its_scope() -> Result<()> {
    let site = Site::new()?;
    let ada = site.user("ada", &["ledger"])?;
    site.admin(&[
        "grant",
        "create",
        "--team",
        "ledger",
        "--role",
        "configurator",
        "--segment",
        "accounting",
    ])?;
    site.admin(&["segment", "update", "accounting", "--quota-vms", "2", "--quota-memory", "1GiB"])?;
    let create = |name| [&["vm", "create", name, "--stopped"], &SMALL[..]].concat();
    ada.run(&create("accounting/two"))?;
    let over = ada.refused(&create("accounting/three"), "over-quota", 1)?;
    ensure!(over.text.contains("accounting may have 2 VMs"), "{}", over.text);
    let report = ada.run(&["segment", "show", "accounting"])?;
    ensure!(report["usage"]["vms"] == 2, "{report}");
    site.admin(&["segment", "update", "accounting", "--quota-vms", "none"])?;
    ada.run(&create("accounting/three"))?;
    ensure!(ada.run(&["segment", "show", "accounting"])?["segment"]["quota"]["memory_mib"] == 1024, "kept");

    let words = ["token", "create", "--scope", "vm.view", "--segment", "accounting", "--expires", "7d"];
    // A token makes no tokens; an administrator makes it for ada.
    ada.refused(&words, "not-allowed", 3)?;
    let made = site.admin(&[&words[..], &["--user", "ada"]].concat())?;
    let narrow = site.with_token("narrow", &made)?;
    ensure!(names(&narrow.run(&["vm", "list"])?).len() == 3, "it sees");
    let refusal = narrow.refused(&["vm", "start", "accounting/two"], "not-allowed", 3)?;
    ensure!(!refusal.text.contains("engineering"), "{}", refusal.text);
    for words in [&["vm", "list"][..], &["vm", "show", "accounting/two"], &["whoami"]] {
        let output = narrow.berth.command(words).output()?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    site.admin(&["token", "delete", made["token"]["id"].as_str().context("an id")?])?;
    narrow.refused(&["vm", "list"], "unauthenticated", 3)?;
    site.cluster.down()
}

#[test]
fn a_policy_is_tried_in_shadow_and_counts_when_two_people_say_so() -> Result<()> {
    const NOBODY_IS_TWO: &str = "@approval(\"saying who may do what\")\n\
        forbid (principal is User, action in [Action::\"grant.manage\", Action::\"team.manage\"], resource)\n\
        when { !context.approved };\n";
    let site = Site::new()?;
    site.admin(&["team", "create", "admins"])?;
    site.admin(&["grant", "create", "--team", "admins", "--role", "admin"])?;
    let eve = site.user("eve", &["admins"])?;
    let path = site.folder.path().join("policy.cedar");
    let create = ["policy", "create", "two-to-give", "--file", path.to_str().context("path")?];

    std::fs::write(&path, "permit (principal, action == Action::\"vm.fly\", resource);")?;
    let refusal = site.cluster.berth.refuses(&create)?;
    ensure!(refusal.exit_code == 2 && refusal.problem["field"] == "file", "{}", refusal.text);
    std::fs::write(&path, NOBODY_IS_TWO)?;
    let report = site.admin(&create)?;
    // The grant to the team, and eve's coming into it, would have waited for somebody else.
    ensure!(report["differences"].as_array().is_some_and(|all| !all.is_empty()), "{report}");
    ensure!(report["policy"]["active"] == false, "it must begin in shadow");
    let grant = ["grant", "create", "--user", "eve", "--role", "viewer", "--segment", "accounting"];
    site.admin(&grant)?;

    let activate = ["policy", "activate", "two-to-give"];
    ensure!(site.cluster.berth.refuses(&activate)?.code() == "approval-needed", "one person is not enough");
    let waiting = eve.run(&["approval", "list"])?;
    eve.run(&["approval", "approve", waiting[0]["id"].as_str().context("an approval")?])?;
    site.admin(&activate)?;
    let refusal = site.cluster.berth.refuses(&grant)?;
    ensure!(refusal.code() == "approval-needed", "{}", refusal.text);
    let id = refusal.problem["value"].as_str().context("an approval")?;
    eve.run(&["approval", "approve", id])?;
    site.admin(&grant)?;
    site.cluster.down()
}
