//! How a run ends: with an exit code that scripts can branch on, and, when it did not go well, with one error that
//! says what was wrong, where, and what to do.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::process::ExitCode;

use berth_api::ClientError;
use berth_model::{OperationId, Problem, ProblemCode};

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::output::{Format, Output, plain};

/// The operation was begun and failed.
const FAILED: u8 = 1;
/// What shells know as "ended by Ctrl-C".
const DETACHED: u8 = 130;

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub enum Failure {
    /// Refused, or not possible.
    Problem(Box<Problem>),
    /// Begun, and failed.
    Operation {
        /// Which.
        operation: OperationId,
        /// Why.
        problem: Box<Problem>,
    },
    /// Something on this machine: a file, a process, the network's set-up.
    Local(Box<Problem>),
    /// The user stopped waiting; what was said about it is said already.
    Detached,
    /// The question was answered, with no.
    Denied,
    /// Whoever read our output has gone.
    OutputClosed,
}

impl Failure {
    /// A field of the command line with a wrong value.
    pub fn field(field: &str, value: impl ToString, expected: &str) -> Self {
        Problem::field(field, value, expected).into()
    }

    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Problem(problem) => problem.code.exit_code(),
            Self::Operation { .. } | Self::Local(_) => FAILED,
            Self::Detached => DETACHED,
            Self::Denied => ProblemCode::NotAllowed.exit_code(),
            Self::OutputClosed => 0,
        }
    }

    /// The problem, if there is one to tell.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) | Self::Operation { problem, .. } | Self::Local(problem) => Some(problem),
            Self::Detached | Self::Denied | Self::OutputClosed => None,
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(Box::new(problem))
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        error.into_problem().into()
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Local(Box::new(Problem::new(ProblemCode::Internal, format!("{error:#}"))))
    }
}

/// Says what went wrong on standard error, and gives the exit code.
pub fn report(failure: &Failure, output: &Output) -> ExitCode {
    if let Some(text) = text(failure, output.format()) {
        output.error(&text);
    }
    ExitCode::from(failure.code())
}

/// What is said about a failure.
pub fn text(failure: &Failure, format: Format) -> Option<String> {
    let problem = failure.problem()?;
    if format == Format::Json {
        return Some(serde_json::to_string(problem).expect("a problem is plain data"));
    }
    let mut text = format!("error: {}", plain(&problem.message));
    if let Some(detail) = detail(problem) {
        let _ = write!(text, "\n  {}", plain(&detail));
    }
    if let (ProblemCode::Internal, Some(request)) = (problem.code, &problem.request_id) {
        let _ = write!(text, "\n  request {}", plain(request));
    }
    if let Some(hint) = hint(problem).filter(|_| !matches!(failure, Failure::Local(_))) {
        let _ = write!(text, "\n  {hint}");
    }
    if let Failure::Operation { operation, .. } = failure {
        let _ = write!(text, "\n  see 'berth operation show {operation}'");
    }
    Some(text)
}

/// Field, value and expectation, where the sentence doesn't say them already.
fn detail(problem: &Problem) -> Option<String> {
    let expected = problem.expected.as_ref()?;
    let is_said = matches!(problem.code, ProblemCode::NotFound | ProblemCode::ApprovalNeeded);
    if is_said || problem.message.contains(expected.as_str()) {
        return None;
    }
    let field = problem.field.as_deref().unwrap_or("it");
    let value = problem.value.as_ref().map(|value| format!("is '{value}': ")).unwrap_or_default();
    Some(format!("{field} {value}expected {expected}"))
}

/// What to do about it, where the message can't know.
fn hint(problem: &Problem) -> Option<&'static str> {
    match problem.code {
        // What is said of join tokens says what to do: 'berth host join-token'.
        ProblemCode::Unauthenticated if problem.message.contains("'berth ") => None,
        // A wrong password, code or walk says itself what it is: to log in is what was being done.
        ProblemCode::Unauthenticated if !problem.message.contains("token") => None,
        ProblemCode::Unauthenticated => Some("log in with 'berth login', or set BERTH_TOKEN"),
        ProblemCode::NotAllowed => Some("'berth whoami' says who you are, 'berth can-i' what you may do"),
        // A machine that joins says whom it means in its own words.
        ProblemCode::Unreachable if problem.field.is_some() => None,
        ProblemCode::Unreachable => {
            Some("is it running, and does 'berth login' or BERTH_URL name the right one?")
        }
        ProblemCode::Busy => {
            Some("'berth operation list --active' shows what is going on; wait for it, or cancel it")
        }
        ProblemCode::Changed => Some("look at it again, then repeat the change"),
        ProblemCode::Internal => Some("this is a fault of Berth's own: please report it"),
        ProblemCode::NotFound => where_to_look(problem.field.as_deref()?),
        ProblemCode::NoPlacement => {
            Some("'berth host list' and 'berth host show HOST' say what the hosts have")
        }
        ProblemCode::BadImage => {
            Some("fetch it anew from its publisher, and compare its checksum: '--sha256' does so")
        }
        ProblemCode::NoSpace => {
            Some("make room there, or use another pool; 'berth host show HOST' says how full they are")
        }
        ProblemCode::OverQuota => {
            Some("'berth segment show SEGMENT' says what is used; delete something, or ask for more")
        }
        // Only one that was put up has an id, and can be followed.
        ProblemCode::ApprovalNeeded if problem.field.is_none() => None,
        ProblemCode::ApprovalNeeded => {
            Some("'berth approval list' shows how it stands; nothing has been changed so far")
        }
        ProblemCode::InvalidInput
        | ProblemCode::AlreadyExists
        | ProblemCode::WrongState
        | ProblemCode::Protected
        | ProblemCode::TooLarge
        | ProblemCode::Hypervisor
        | ProblemCode::Guest
        | ProblemCode::Cancelled
        | ProblemCode::TooBusy => None,
    }
}

/// Where to see which names there are.
fn where_to_look(noun: &str) -> Option<&'static str> {
    match noun {
        "host" => Some("'berth host list' shows those that there are"),
        "image" => Some("'berth image list' shows those that there are"),
        "operation" => Some("'berth operation list' shows those that there are"),
        "segment" => Some("'berth segment list' shows those that there are"),
        "snapshot" => Some("'berth snapshot list VM' shows those that there are"),
        "vm" => Some("'berth vm list' shows those that there are"),
        "team" => Some("'berth team list' shows those that you may see"),
        "user" => Some("'berth user list' shows those that you may see"),
        "role" => Some("'berth role list' shows those that there are"),
        "grant" => Some("'berth grant list' shows those that you may see"),
        "token" => Some("'berth token list' shows those that you may see"),
        "policy" => Some("'berth policy list' shows those that there are"),
        "approval" => Some("'berth approval list --all' shows those that you may see"),
        _ => None,
    }
}

/// Tells a command line that can't be read from one that asks for help, in the format that it asks for itself.
pub fn usage(error: &clap::Error, arguments: impl Iterator<Item = OsString>) -> ExitCode {
    if !error.use_stderr() || !wants_json(arguments) {
        // Nobody is left to tell when this fails.
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    }
    report(&usage_problem(error).into(), &Output::to_terminal(Format::Json))
}

/// A command line that can't be read, with the argument at fault as its field.
fn usage_problem(error: &clap::Error) -> Problem {
    let problem = Problem::new(ProblemCode::InvalidInput, usage_message(error));
    let context = |kind| error.get(kind).map(words);
    if let Some(word) = context(ContextKind::InvalidSubcommand) {
        return problem.at("command", word, "one that '--help' lists");
    }
    let Some(argument) = context(ContextKind::InvalidArg) else { return problem };
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    let choice = context(ContextKind::ValidValue).filter(|choice| !choice.is_empty());
    let expected = match (error.kind(), choice) {
        (_, Some(choice)) => format!("one of: {choice}"),
        (ErrorKind::UnknownArgument, None) => "an option that '--help' lists".to_owned(),
        (ErrorKind::MissingRequiredArgument, None) => format!("{argument} to be given"),
        (ErrorKind::ArgumentConflict, None) => "only one of those that exclude each other".to_owned(),
        (_, None) => expectation(error),
    };
    problem.at(field_of(&argument), value, expected)
}

fn words(value: &ContextValue) -> String {
    match value {
        ContextValue::Strings(words) => words.join(", "),
        other => other.to_string(),
    }
}

/// `--memory <SIZE>` is about `memory`, and `<NAME>` about `name`.
fn field_of(argument: &str) -> String {
    let first = argument.split([' ', '=', ',']).next().unwrap_or_default();
    first.trim_matches(['-', '<', '>', '[', ']', '.']).to_ascii_lowercase()
}

/// What the reader of a value said that it takes.
fn expectation(error: &clap::Error) -> String {
    let Some(said) = std::error::Error::source(error).map(ToString::to_string) else {
        return "what '--help' says".to_owned();
    };
    if let Some((_, range)) = said.split_once(" is not in ") {
        return format!("a number in {range}");
    }
    match said.split_once("expected ") {
        Some((_, expected)) => expected.to_owned(),
        None => said,
    }
}

fn usage_message(error: &clap::Error) -> String {
    let rendered = error.render().to_string();
    let first = rendered.split("\n\n").next().unwrap_or_default().trim();
    first.strip_prefix("error: ").unwrap_or(first).to_owned()
}

/// The arguments can't be parsed, so the one that matters is looked for by hand.
fn wants_json(arguments: impl Iterator<Item = OsString>) -> bool {
    let words: Vec<OsString> = arguments.collect();
    words.iter().any(|word| word == "--output=json" || word == "-ojson" || word == "-o=json")
        || words.windows(2).any(|pair| (pair[0] == "--output" || pair[0] == "-o") && pair[1] == "json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(code: ProblemCode) -> Problem {
        Problem::new(code, "it did not work")
    }

    #[test]
    fn exit_codes_are_those_of_the_manual() {
        let expected = [
            (ProblemCode::InvalidInput, 2),
            (ProblemCode::Unauthenticated, 3),
            (ProblemCode::NotAllowed, 3),
            (ProblemCode::NotFound, 4),
            (ProblemCode::AlreadyExists, 5),
            (ProblemCode::Busy, 5),
            (ProblemCode::WrongState, 5),
            (ProblemCode::Protected, 5),
            (ProblemCode::NoPlacement, 1),
            (ProblemCode::Hypervisor, 1),
            (ProblemCode::Internal, 1),
            (ProblemCode::Unreachable, 6),
        ];
        for (code, exit) in expected {
            assert_eq!(Failure::from(problem(code)).code(), exit, "{code:?}");
        }
        let operation = OperationId::from_entropy([1; 10]);
        // An operation that failed has failed, whatever it failed of: 4 would read as "no such VM".
        let problem = Box::new(problem(ProblemCode::NotFound));
        assert_eq!(Failure::Operation { operation, problem }.code(), 1);
        assert_eq!(Failure::Denied.code(), 3);
    }

    #[test]
    fn an_error_says_what_where_and_what_to_do() {
        let failure = Failure::from(Problem::field("memory_mib", 0, "at least 32"));
        let said = text(&failure, Format::Table).expect("a problem");
        assert_eq!(said, "error: memory_mib is '0': expected at least 32");
        let busy = problem(ProblemCode::Busy).at("vm", "default/books", "no operation on it");
        let said = text(&busy.into(), Format::Table).expect("a problem");
        assert_eq!(
            said,
            "error: it did not work\n  vm is 'default/books': expected no operation on it\n  \
             'berth operation list --active' shows what is going on; wait for it, or cancel it"
        );
    }

    #[test]
    fn an_error_as_json_is_the_problem_itself() {
        let failure = Failure::from(Problem::not_found("vm", "default/books"));
        let said = text(&failure, Format::Json).expect("a problem");
        let read: Problem = serde_json::from_str(&said).expect("json");
        assert_eq!(Some(&read), failure.problem());
    }

    #[test]
    fn what_a_guest_or_a_host_wrote_can_not_drive_the_terminal() {
        let failure =
            Failure::from(Problem::new(ProblemCode::Hypervisor, "qemu said \x1b]0;owned\x07\x1b[2J"));
        let said = text(&failure, Format::Table).expect("a problem");
        assert!(!said.contains('\x1b') && !said.contains('\x07'), "{said:?}");
    }

    #[test]
    fn a_line_that_can_not_be_read_names_the_argument_its_value_and_what_it_takes() {
        use clap::Parser as _;
        let of = |line: &str| {
            let error = crate::arguments::Cli::try_parse_from(line.split(' ')).expect_err(line);
            let problem = usage_problem(&error);
            let text = |field: Option<String>| field.unwrap_or_default();
            (text(problem.field), text(problem.value), text(problem.expected))
        };
        let (field, value, expected) = of("berth vm create books --image probe --memory -1GiB");
        assert_eq!((field.as_str(), value.as_str()), ("memory", "-1GiB"));
        assert_eq!(expected, "a size like 512MiB, 2GiB or 2G");
        let (field, value, expected) = of("berth vm create books --image probe --vcpus -3");
        assert_eq!((field.as_str(), value.as_str()), ("vcpus", "-3"));
        assert!(expected.starts_with("a number in 0..="), "{expected}");
        let (field, value, expected) = of("berth image import d --name a --format vmdk");
        assert_eq!(
            (field.as_str(), value.as_str(), expected.as_str()),
            ("format", "vmdk", "one of: qcow2, raw")
        );
        let (field, value, _) = of("berth vm create A_b --image probe");
        assert_eq!((field.as_str(), value.as_str()), ("name", "A_b"));
        let (field, _, expected) = of("berth vm create books");
        assert_eq!((field.as_str(), expected.as_str()), ("image", "--image <IMAGE> to be given"));
        let (field, value, _) = of("berth vm crate books");
        assert_eq!((field.as_str(), value.as_str()), ("command", "crate"));
        assert_eq!(of("berth vm list --fast").0, "fast");
    }

    #[test]
    fn json_is_found_in_arguments_that_do_not_parse() {
        let asks = |line: &str| wants_json(line.split(' ').map(OsString::from));
        assert!(
            asks("berth vm crate --output json") && asks("berth -o json vm") && asks("berth --output=json")
        );
        assert!(!asks("berth vm create json --output yaml"));
    }
}
