//! The `berth` binary: what it is depends on the subcommand. This file is its table of contents.

mod arguments;
mod exit;
mod output;
mod units;

mod config;
mod lookup;
mod names;
mod options;
mod session;

mod progress;
mod wait;

mod daemon;
mod up;

mod access;
mod approval;
mod audit;
mod backup_worker;
mod console;
mod grant;
mod host;
mod image;
mod join;
mod login;
mod migration;
mod operation;
mod own;
mod policy;
mod repository;
mod role;
mod schedule;
mod segment;
mod snapshot;
mod team;
mod token;
mod user;
mod vm;

#[cfg(test)]
mod fake;

use std::future::Future;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use arguments::{Cli, Command, Noun};
use exit::Failure;
use output::Output;
use session::Session;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(Cli { command: Command::BackupWorker, .. }) => return backup_worker::run(),
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error, std::env::args_os()),
    };
    let output = Output::to_terminal(cli.output);
    match run(cli.command, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => exit::report(&failure, &output),
    }
}

fn run(command: Command, output: &Output) -> Result<(), Failure> {
    match command {
        Command::Up(arguments) => block_on(up::run(arguments, output)),
        Command::Down(arguments) => block_on(up::down(arguments, output)),
        Command::Manager { verb } => daemon::manager(verb),
        Command::Agent { verb } => daemon::agent(verb, output),
        Command::Login(arguments) => block_on(login::run(arguments, output)),
        Command::Logout => block_on(login::logout(output)),
        Command::Noun(Noun::Audit { verb }) if audit::is_offline(&verb) => audit::run_offline(&verb, output),
        Command::Noun(noun) => block_on(async { ask(noun, &Session::open(output.clone())?).await }),
        // It speaks another language, and has its own way out.
        Command::BackupWorker => Ok(()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "berth", &mut script);
            output.text(&String::from_utf8_lossy(&script))
        }
    }
}

async fn ask(noun: Noun, session: &Session) -> Result<(), Failure> {
    match noun {
        Noun::Whoami => access::whoami(session).await,
        Noun::CanI(arguments) => access::can_i(session, arguments).await,
        Noun::WhoCan(arguments) => access::who_can(session, arguments).await,
        Noun::WhatCan(arguments) => access::what_can(session, arguments).await,
        Noun::Host { verb } => host::run(session, verb).await,
        Noun::Segment { verb } => segment::run(session, verb).await,
        Noun::Image { verb } => image::run(session, verb).await,
        Noun::Vm { verb } => vm::run(session, verb).await,
        Noun::Snapshot { verb } => snapshot::run(session, verb).await,
        Noun::Repository { verb } => repository::run(session, verb).await,
        Noun::Schedule { verb } => schedule::run(session, verb).await,
        Noun::Migration { verb } => migration::run(session, verb).await,
        Noun::Operation { verb } => operation::run(session, verb).await,
        Noun::Session { verb } => own::run(session, verb).await,
        Noun::User { verb } => user::run(session, verb).await,
        Noun::Token { verb } => token::run(session, verb).await,
        Noun::Team { verb } => team::run(session, verb).await,
        Noun::Role { verb } => role::run(session, verb).await,
        Noun::Grant { verb } => grant::run(session, verb).await,
        Noun::Approval { verb } => approval::run(session, verb).await,
        Noun::Policy { verb } => policy::run(session, verb).await,
        Noun::Audit { verb } => audit::run(session, verb).await,
    }
}

/// Runs what only asks and waits, for which one thread is enough.
fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(anyhow::Error::new)?;
    let result = runtime.block_on(work);
    // A thread may still sit in a read of a file: it must not keep the process.
    runtime.shutdown_background();
    result
}
