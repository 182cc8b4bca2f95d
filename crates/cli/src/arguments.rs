//! The command line as a whole: nouns here, the verbs of each noun in the noun's own file.

use clap::{Args, Parser, Subcommand};

use crate::output::Format;
use crate::{
    access, approval, audit, daemon, grant, host, image, login, migration, operation, own, policy,
    repository, role, schedule, segment, snapshot, team, token, up, user, vm,
};

const AFTER: &str = "\
A VM is named segment/name; a name alone means segment 'default'. Wherever a name is expected, an id will do.
Sizes: 512MiB, 2GiB, 2G (1024-based). Bandwidth: 800mbit, 1gbit, 100MiB/s. Durations: 90s, 5m, 24h, 7d.

Which cluster: BERTH_CONFIG=FILE, or BERTH_CONTEXT=DIR with a config.toml, or what 'berth login' wrote to
~/.config/berth/config.toml; BERTH_URL, BERTH_CA (a file) and BERTH_TOKEN each overrule what stands there.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not allowed, 4 not found, 5 conflict, 6 unreachable,
130 left waiting with Ctrl-C (the operation goes on).";

/// Virtual machines in good order: any VM back to its known-good snapshot, or on another host, in moments.
#[derive(Debug, Parser)]
#[command(name = "berth", version, after_help = AFTER, disable_help_subcommand = true)]
pub struct Cli {
    /// How to answer: tables for people, json (a line an event while waiting) or yaml for programs
    #[arg(long, short = 'o', global = true, value_enum, default_value = "table")]
    pub output: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What there is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring up a whole cluster on this machine, to try it
    Up(up::UpArguments),
    /// Take down what 'berth up' brought up
    Down(up::DownArguments),
    /// The manager's daemon
    Manager {
        /// What to do.
        #[command(subcommand)]
        verb: daemon::ManagerVerb,
    },
    /// The daemon of a host
    Agent {
        /// What to do.
        #[command(subcommand)]
        verb: daemon::AgentVerb,
    },
    /// Say which cluster to talk to, and who you are
    Login(login::Arguments),
    /// End your session
    Logout,
    /// What is asked of a manager.
    #[command(flatten)]
    Noun(Noun),
    /// Work on a repository for the agent, which starts this itself
    #[command(hide = true, name = berth_api::backup::WORKER_COMMAND)]
    BackupWorker,
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// The nouns, each with its verbs in a file of its own.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Who you are
    Whoami,
    /// Whether you may do something, and why (exit code 3: you may not)
    CanI(access::CanIArguments),
    /// Who may do something, and by what
    WhoCan(access::CanIArguments),
    /// What you, or another user, may do, and where
    WhatCan(access::WhatCanArguments),
    /// Machines with an agent
    Host {
        /// What to do.
        #[command(subcommand)]
        verb: host::Verb,
    },
    /// What keeps teams apart: each VM is in exactly one, and a grant reaches the VMs of its segment and those inside it
    Segment {
        /// What to do.
        #[command(subcommand)]
        verb: segment::Verb,
    },
    /// Immutable disks and kernels that VMs start from
    Image {
        /// What to do.
        #[command(subcommand)]
        verb: image::Verb,
    },
    /// Virtual machines
    Vm {
        /// What to do.
        #[command(subcommand)]
        verb: vm::Verb,
    },
    /// VMs at one instant: disk, memory and devices
    Snapshot {
        /// What to do.
        #[command(subcommand)]
        verb: snapshot::Verb,
    },
    /// Places for backups, off the hosts
    Repository {
        /// What to do.
        #[command(subcommand)]
        verb: repository::Verb,
    },
    /// Snapshots by the clock, and what is kept of them
    Schedule {
        /// What to do.
        #[command(subcommand)]
        verb: schedule::Verb,
    },
    /// Moves of VMs between hosts ('berth vm migrate' begins one)
    Migration {
        /// What to do.
        #[command(subcommand)]
        verb: migration::Verb,
    },
    /// Changes that take time
    Operation {
        /// What to do.
        #[command(subcommand)]
        verb: operation::Verb,
    },
    /// Where you are logged in
    Session {
        /// What to do.
        #[command(subcommand)]
        verb: own::Verb,
    },
    /// People and programs
    User {
        /// What to do.
        #[command(subcommand)]
        verb: user::Verb,
    },
    /// What users prove themselves with
    Token {
        /// What to do.
        #[command(subcommand)]
        verb: token::Verb,
    },
    /// People who have something in common
    Team {
        /// What to do.
        #[command(subcommand)]
        verb: team::Verb,
    },
    /// Sets of actions that can be granted together
    Role {
        /// What to do.
        #[command(subcommand)]
        verb: role::Verb,
    },
    /// Who has which role where, and until when
    Grant {
        /// What to do.
        #[command(subcommand)]
        verb: grant::Verb,
    },
    /// What waits for a second person
    Approval {
        /// What to do.
        #[command(subcommand)]
        verb: approval::Verb,
    },
    /// Policies of one's own, in Cedar, beside the grants
    Policy {
        /// What to do.
        #[command(subcommand)]
        verb: policy::Verb,
    },
    /// Who did what, and by whose leave
    Audit {
        /// What to do.
        #[command(subcommand)]
        verb: audit::Verb,
    },
}

/// How much of a list.
#[derive(Debug, Args)]
pub struct ListArguments {
    /// At most so many; all without it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
}

/// How to make a change that is done at once.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct DryRunArguments {
    /// Check everything that can be checked, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// How to make a change that takes time.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct ChangeArguments {
    /// Check everything that can be checked, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Wait until it is done (the default); Ctrl-C leaves it going on
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Begin it, print its operation, and don't wait
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
}

impl ChangeArguments {
    /// Whether to wait until it is done.
    pub const fn wait(self) -> bool {
        self.wait || !self.no_wait
    }
}

#[cfg(test)]
mod tests;
