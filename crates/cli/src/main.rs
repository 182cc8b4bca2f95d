//! The `berth` binary: what it is depends on the subcommand. This file is its table of contents.

mod arguments;
mod exit;
mod output;
mod units;

mod config;
mod lookup;
mod session;

mod progress;
mod wait;

mod daemon;
mod up;

mod access;
mod audit;
mod console;
mod host;
mod image;
mod login;
mod migration;
mod operation;
mod segment;
mod snapshot;
mod token;
mod user;
mod vm;

#[cfg(test)]
mod fake;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use arguments::{Cli, Command};
use exit::Failure;
use output::Output;
use session::Session;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error, std::env::args_os()),
    };
    let output = Output::to_terminal(cli.output);
    let result = match cli.command {
        Command::Manager { verb } => daemon::manager(verb),
        Command::Agent { verb } => daemon::agent(verb, &output),
        command => ask(command, output.clone()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => exit::report(&failure, &output),
    }
}

fn ask(command: Command, output: Output) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(anyhow::Error::new)?;
    let result = runtime.block_on(run(command, output));
    // A thread may still sit in a read of a file: it must not keep the process.
    runtime.shutdown_background();
    result
}

async fn run(command: Command, output: Output) -> Result<(), Failure> {
    match command {
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "berth", &mut std::io::stdout());
            Ok(())
        }
        Command::Up(arguments) => up::run(arguments, &output).await,
        Command::Down(arguments) => up::down(arguments, &output).await,
        Command::Login(arguments) => login::run(arguments, &output).await,
        noun => ask_manager(noun, &Session::open(output)?).await,
    }
}

async fn ask_manager(noun: Command, session: &Session) -> Result<(), Failure> {
    match noun {
        Command::Up(_)
        | Command::Down(_)
        | Command::Manager { .. }
        | Command::Agent { .. }
        | Command::Login(_)
        | Command::Completions { .. } => Ok(()),
        Command::Whoami => access::whoami(session).await,
        Command::CanI(arguments) => access::can_i(session, arguments).await,
        Command::Host { verb } => host::run(session, verb).await,
        Command::Segment { verb } => segment::run(session, verb).await,
        Command::Image { verb } => image::run(session, verb).await,
        Command::Vm { verb } => vm::run(session, verb).await,
        Command::Snapshot { verb } => snapshot::run(session, verb).await,
        Command::Migration { verb } => migration::run(session, verb).await,
        Command::Operation { verb } => operation::run(session, verb).await,
        Command::User { verb } => user::run(session, verb).await,
        Command::Token { verb } => token::run(session, verb).await,
        Command::Audit { verb } => audit::run(session, verb).await,
    }
}
