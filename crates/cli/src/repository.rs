//! `berth repository`: where backups are.

use std::io::Read;
use std::path::PathBuf;

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateRepository, PageQuery, RepositoryBackups, RepositoryCreate, RepositoryDelete, RepositoryList,
    RepositoryPath, RepositoryShow,
};
use berth_model::name::Name;
use berth_model::repository::{Backup, Location, Repository, RepositoryKeys, Secret};
use clap::{Args, Subcommand};

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::names::Names;
use crate::output::{Facts, Table, instant};
use crate::session::Session;
use crate::snapshot::BACKUP_ID_CHARS;
use crate::units;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make a repository known
    Create(Box<CreateArguments>),
    /// List the repositories that you may see
    List {
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show a repository
    Show {
        /// Its name or id
        repository: String,
    },
    /// List the backups in a repository, the oldest first
    Snapshots {
        /// Its name or id
        repository: String,
    },
    /// Forget a repository and its keys; what is in it stays
    Delete {
        /// Its name or id
        repository: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// What to make known.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// Its name
    #[arg(value_parser = parse_name)]
    name: Name,
    /// Where it is: /DIRECTORY on the hosts, sftp://USER@HOST:PORT/DIRECTORY,
    /// or s3://BUCKET/PREFIX?endpoint=URL&region=REGION
    #[arg(long)]
    url: Location,
    /// A file with its password in the first line; '-' reads it from standard input
    #[arg(long)]
    password_file: PathBuf,
    /// What lets one in there: for sftp a private key, for s3 a file with access_key_id=… and secret_access_key=…
    #[arg(long)]
    key_file: Option<PathBuf>,
    /// For sftp: the machine's keys, as in known_hosts; without it those that the agents' own user knows
    #[arg(long)]
    known_hosts_file: Option<PathBuf>,
    /// For s3: the certificates of who vouches for the service; without it the public ones
    #[arg(long)]
    ca_file: Option<PathBuf>,
    /// Only for this segment
    #[arg(long)]
    segment: Option<String>,
    /// Make the repository, where there is none
    #[arg(long)]
    init: bool,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Create(arguments) => create(session, *arguments).await,
        Verb::List { list } => show_all(session, list.limit).await,
        Verb::Show { repository } => {
            let found = session.ask::<RepositoryShow>(&RepositoryPath { repository }, &Nothing {}).await?;
            let segments = Names::of_segments(session).await;
            session.output.one(&found, || facts(&found, &segments))
        }
        Verb::Snapshots { repository } => {
            let found = session.ask::<RepositoryBackups>(&RepositoryPath { repository }, &Nothing {}).await?;
            session.output.list(&found.backups, || backups(&found.backups))
        }
        Verb::Delete { repository, dry_run } => delete(session, repository, dry_run).await,
    }
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { name, url, password_file, key_file, known_hosts_file, ca_file, segment, init } =
        arguments;
    let text = |option: &str, path: &PathBuf| read(path).map_err(|error| unreadable(option, path, &error));
    let some =
        |option: &str, path: &Option<PathBuf>| path.as_ref().map(|path| text(option, path)).transpose();
    let password = text("password-file", &password_file)?;
    let keys = RepositoryKeys {
        password: Secret::new(password.lines().next().unwrap_or_default().to_owned()),
        key: some("key-file", &key_file)?.map(Secret::new),
        known_hosts: some("known-hosts-file", &known_hosts_file)?,
        ca: some("ca-file", &ca_file)?,
    };
    let wish = CreateRepository { name, url: url.to_string(), segment, keys, init };
    let made = session.send::<RepositoryCreate>(&Nothing {}, &Nothing {}, &wish).await?;
    let how = if init { "was made and is known" } else { "is known" };
    session.output.done(&made, || format!("repository {} at {} {how}", made.name, made.url))
}

fn read(path: &PathBuf) -> std::io::Result<String> {
    if path.as_os_str() != "-" {
        return std::fs::read_to_string(path);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

fn unreadable(option: &str, path: &std::path::Path, error: &std::io::Error) -> Failure {
    Failure::field(option, path.display().to_string(), &format!("a file that can be read ({error})"))
}

async fn show_all(session: &Session, limit: Option<u32>) -> Result<(), Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    let all = session.pages::<RepositoryList, _>(&Nothing {}, limit, query).await?;
    let segments = Names::of_segments(session).await;
    session.output.list(&all, || {
        Table::of(&["NAME", "URL", "SEGMENT"], &all, |one| {
            [one.name.to_string(), one.url.to_string(), segments.of_some(one.segment.as_ref())]
        })
    })
}

async fn delete(session: &Session, repository: String, dry_run: DryRunArguments) -> Result<(), Failure> {
    let path = RepositoryPath { repository };
    let found = session.ask::<RepositoryShow>(&path, &Nothing {}).await?;
    if dry_run.dry_run {
        return session.tried(&format!("would forget repository {} at {}", found.name, found.url));
    }
    session.ask::<RepositoryDelete>(&path, &Nothing {}).await?;
    session.output.done(&found, || format!("repository {} is forgotten; what is in it stays", found.name))
}

fn facts(repository: &Repository, segments: &Names) -> Facts {
    Facts::new()
        .with("name", &repository.name)
        .with("id", &repository.id)
        .with("url", &repository.url)
        .with("segment", segments.of_some(repository.segment.as_ref()))
        .with("known since", instant(repository.created_at))
}

fn backups(all: &[Backup]) -> Table {
    Table::of(&["ID", "VM", "SNAPSHOT", "MADE", "SIZE", "ADDED"], all, |one| {
        [
            one.id.chars().take(BACKUP_ID_CHARS).collect(),
            one.vm.clone(),
            one.snapshot.clone(),
            instant(one.created_at),
            units::bytes(one.bytes),
            units::bytes(one.added_bytes),
        ]
    })
}
