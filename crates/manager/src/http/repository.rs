//! Repositories: making them known, seeing what is in them, and making VMs of that.
//!
//! The manager reads no repository itself. It has a host do that, which it gives the keys for as long as it takes.

use std::sync::Arc;
use std::time::Duration;

use berth_api::ClientError;
use berth_api::agent::{
    BackupList, FoundBackup, OpenRepository, RepositoryContents, RepositoryList as AgentList, RepositoryLook,
    RepositoryOpen,
};
use berth_api::endpoint::Nothing;
use berth_api::manager::{
    OperationRef, Page, RepositoryBackups, RepositoryCreate, RepositoryDelete, RepositoryList,
    RepositoryShow, SnapshotImport,
};
use berth_model::access::Action;
use berth_model::host::{Host, HostState};
use berth_model::repository::{Location, Repository, RepositoryAccess, RepositoryKeys, S3Keys, URL_RULE};
use berth_model::{Problem, ProblemCode, RepositoryId};

use super::{list, operation};
use crate::cluster::Cluster;
use crate::door::target::{ForRepository, TheList, TheRepository, repository_resource};
use crate::door::{Answer, Call, Door};
use crate::operations::{Begin, OperationRequest};
use crate::records::{RecordsError, RepositoryKeysRow, Row, Transaction, UniqueName};
use crate::workflow::export::access;

/// How long a host may take to read a repository's list: it gives up a little earlier by itself.
const READ_TIMEOUT: Duration = Duration::from_secs(130);
/// Longest password or key, in bytes.
const KEY_BYTES_MAX: usize = 64 * 1024;

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(create).mount(show).mount(delete).mount(backups).mount(import)
}

async fn show_all(call: Call<RepositoryList, TheList>) -> Result<Answer<Page<Repository>>, Problem> {
    let (cluster, query) = (call.ctx.cluster(), &call.input.query);
    let visible = call.ctx.visible(Action::RepositoryView);
    let mut all = cluster.records.list::<Repository>();
    all.retain(|row| visible.shows(row.segment.as_ref(), || repository_resource(cluster, row)));
    let key = |row: &Arc<Row<Repository>>| row.id.clone();
    let page = list::page(&all, query.limit, query.cursor.as_deref(), key, |row| row.value.clone())?;
    Ok(Answer::new(page))
}

async fn create(call: Call<RepositoryCreate, ForRepository>) -> Result<Answer<Repository>, Problem> {
    let (cluster, wish) = (call.ctx.cluster(), call.input.body);
    let url: Location = wish.url.parse().map_err(|_| Problem::field("url", "…", URL_RULE))?;
    check_keys(&url, &wish.keys)?;
    if call.target.0.is_some() {
        check_lent(&url, &wish.keys)?;
    }
    let name = UniqueName::in_cluster("repository", &wish.name);
    if cluster.records.id_of(&name).is_some() {
        let taken = RecordsError::Taken { noun: "repository".to_owned(), name: wish.name.to_string() };
        return Err(taken.into());
    }
    let host = reader(cluster, None)?;
    let open = OpenRepository {
        access: RepositoryAccess { url: url.clone(), keys: wish.keys.clone() },
        init: wish.init,
    };
    let opened =
        cluster.agents.call::<RepositoryOpen>(&host, &Nothing {}, &Nothing {}, &open, READ_TIMEOUT).await;
    opened.map_err(|error| from(&host, error))?;
    let repository = Repository {
        id: RepositoryId::from_entropy(cluster.entropy.id()),
        name: wish.name,
        url,
        segment: call.target.0,
        created_at: call.ctx.now(),
    };
    let mut transaction = Transaction::new();
    transaction.create(&repository);
    transaction.create(&RepositoryKeysRow { repository: repository.id.clone(), keys: wish.keys });
    transaction.claim(&name, repository.id.as_str());
    cluster.records.commit(transaction).await?;
    Ok(Answer::new(repository))
}

/// What can be seen to be of no use without going there.
fn check_keys(url: &Location, keys: &RepositoryKeys) -> Result<(), Problem> {
    let hidden = |field: &str, expected: &str| Err(Problem::field(field, "…", expected));
    let password = keys.password.reveal();
    if password.is_empty() || password.len() > KEY_BYTES_MAX || password.contains(['\n', '\r', '\0']) {
        return hidden("keys.password", "one line that is not empty");
    }
    let key = keys.key.as_ref().map(|key| key.reveal());
    if key.is_some_and(|key| key.len() > KEY_BYTES_MAX || key.contains('\0')) {
        return hidden("keys.key", "the text of a key file");
    }
    match url {
        Location::S3(_) if key.and_then(S3Keys::parse).is_none() => hidden("keys.key", S3Keys::RULE),
        Location::Directory(_) if key.is_some() => hidden("keys.key", "none, for a directory"),
        _ => Ok(()),
    }
}

/// A segment's repository uses nothing of the hosts but their way to the network: not their directories, and neither the
/// keys nor the acquaintances of the user that the agent runs as. Those are the cluster's to lend.
fn check_lent(url: &Location, keys: &RepositoryKeys) -> Result<(), Problem> {
    match url {
        Location::Directory(path) => {
            let expected =
                "sftp:// or s3:// for a segment's repository: the hosts' directories are the cluster's";
            Err(Problem::field("url", path, expected))
        }
        Location::Sftp(_) if keys.key.is_none() => {
            Err(Problem::field("keys.key", "", "a private key of its own, for a segment's repository"))
        }
        Location::Sftp(_) if keys.known_hosts.is_none() => {
            let expected = "the machine's keys, for a segment's repository";
            Err(Problem::field("keys.known_hosts", "", expected))
        }
        _ => Ok(()),
    }
}

async fn show(call: Call<RepositoryShow, TheRepository>) -> Result<Answer<Repository>, Problem> {
    let row = &call.target.0;
    Ok(Answer::new(row.value.clone()).at(row.revision))
}

async fn delete(call: Call<RepositoryDelete, TheRepository>) -> Result<Answer<()>, Problem> {
    let cluster = call.ctx.cluster();
    loop {
        let row = cluster.records.require::<Repository>(&call.target.0.id)?;
        let mut transaction = Transaction::new();
        transaction.remove(&row);
        transaction.forget::<RepositoryKeysRow>(&row.id);
        transaction.release(&UniqueName::in_cluster("repository", &row.name));
        match cluster.records.commit(transaction).await {
            Err(RecordsError::Conflict { .. }) => cluster.records.catch_up().await?,
            other => return other.map(|_| Answer::new(())).map_err(Into::into),
        }
    }
}

async fn backups(call: Call<RepositoryBackups, TheRepository>) -> Result<Answer<BackupList>, Problem> {
    let cluster = call.ctx.cluster();
    let host = reader(cluster, None)?;
    Ok(Answer::new(all_backups(cluster, &host, &call.target.0.value.id).await?))
}

async fn all_backups(cluster: &Cluster, host: &Row<Host>, id: &RepositoryId) -> Result<BackupList, Problem> {
    let access = access(cluster, id)?;
    let listed =
        cluster.agents.call::<AgentList>(host, &Nothing {}, &Nothing {}, &access, READ_TIMEOUT).await;
    listed.map_err(|error| from(host, error))
}

async fn import(call: Call<SnapshotImport, TheRepository>) -> Result<Answer<OperationRef>, Problem> {
    let (ctx, dry_run) = (&call.ctx, call.input.query.dry_run.unwrap_or_default());
    let (cluster, mut wish) = (ctx.cluster(), call.input.body);
    if wish.cold && wish.paused {
        let expected = "false: a guest that starts from its disk was nowhere yet";
        return Err(Problem::field("paused", true, expected));
    }
    // From here on by id: what was checked is what is used, whoever renames what meanwhile.
    wish.segment = ctx.segment(&wish.segment, Action::VmCreate)?.0.value.id.to_string();
    let host = reader(cluster, wish.host.as_deref())?;
    let id = call.target.0.value.id.clone();
    let FoundBackup { backup, contents } = find(cluster, &host, &id, &wish.backup).await?;
    let request = OperationRequest::SnapshotImport {
        repository: id,
        backup: backup.id,
        contents: Box::new(contents),
        wish,
    };
    let begin = Begin { approved: ctx.approved, ..Begin::new(ctx.actor(), request) };
    operation::submit(cluster, begin, dry_run).await
}

/// The backup that a text means, with what it says of itself.
async fn find(
    cluster: &Cluster,
    host: &Row<Host>,
    id: &RepositoryId,
    text: &str,
) -> Result<FoundBackup, Problem> {
    let backup = if text.contains('/') {
        let means = |vm: &str, snapshot: &str| text == vm || text == format!("{vm}/{snapshot}");
        let all = all_backups(cluster, host, id).await?.backups;
        let newest = all.into_iter().rfind(|backup| means(&backup.vm, &backup.snapshot));
        newest.ok_or_else(|| Problem::not_found("backup", text))?.id
    } else {
        text.to_ascii_lowercase()
    };
    if backup.is_empty() || !backup.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let expected = "the beginning of a backup's id, or SEGMENT/VM[/SNAPSHOT]";
        return Err(Problem::field("backup", text, expected));
    }
    let wish = RepositoryContents { access: access(cluster, id)?, backup };
    let found =
        cluster.agents.call::<RepositoryLook>(host, &Nothing {}, &Nothing {}, &wish, READ_TIMEOUT).await;
    found.map_err(|error| from(host, error))
}

/// A host that can be asked to read a repository.
fn reader(cluster: &Cluster, named: Option<&str>) -> Result<Arc<Row<Host>>, Problem> {
    if let Some(named) = named {
        return cluster.records.find_host(named);
    }
    let online = cluster.records.list::<Host>().into_iter().find(|host| host.state == HostState::Online);
    online.ok_or_else(|| {
        Problem::new(ProblemCode::Unreachable, "no host is online, and it takes one to reach a repository")
    })
}

/// What a host met, with its name: another host may reach what this one does not.
fn from(host: &Host, error: ClientError) -> Problem {
    let problem = error.into_problem();
    Problem { message: format!("from host {}: {}", host.name, problem.message), ..problem }
}
