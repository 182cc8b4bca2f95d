//! How far long work is: a bar on a terminal, lines in a log, JSON for programs.
//!
//! `warm-up  round 3  ████████░░  812 MiB of 2.0 GiB   96 MiB/s   dirtying 41 MiB/s   left 4 s`

use std::time::{Duration, Instant};

use berth_model::operation::{Operation, OperationState, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::exit::Failure;
use crate::output::{Format, Output, plain};
use crate::units;

/// How often a log gets a line while nothing changes but figures. More often, and the log is noise; less, and the
/// reader thinks that it hangs.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// How often programs hear of bytes that this command itself moves.
const TRANSFER_EVENT_INTERVAL: Duration = Duration::from_millis(500);

/// What a program is told while it waits, a line each.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    /// An operation as it stands now.
    Progress { operation: &'a Operation },
    /// Bytes that this command moves.
    Transfer { subject: &'a str, progress: &'a Progress },
}

/// Shows progress in the way that suits who looks.
pub struct Reporter {
    output: Output,
    way: Way,
}

enum Way {
    Bar(ProgressBar),
    Lines(Lines),
    Events { last_transfer: Option<Instant>, last_operation: Option<Box<Operation>> },
}

impl Reporter {
    /// For this output.
    pub fn new(output: &Output) -> Self {
        let way = match (output.format(), output.draws()) {
            (Format::Json, _) => Way::Events { last_transfer: None, last_operation: None },
            (_, true) => Way::Bar(new_bar()),
            (_, false) => Way::Lines(Lines::default()),
        };
        Self { output: output.clone(), way }
    }

    /// Shows how an operation stands.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn operation(&mut self, operation: &Operation) -> Result<(), Failure> {
        if let Way::Events { last_operation, .. } = &mut self.way {
            if last_operation.as_deref() == Some(operation) {
                return Ok(());
            }
            *last_operation = Some(Box::new(operation.clone()));
            return self.output.event(&Event::Progress { operation });
        }
        if !operation.state.is_over() {
            let subject = format!("{} {}", operation.kind, operation.subject);
            self.show(&subject, operation.state == OperationState::Undoing, &operation.progress);
        }
        Ok(())
    }

    /// Shows how far bytes are that this command itself moves.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub fn transfer(&mut self, subject: &str, progress: &Progress) -> Result<(), Failure> {
        if let Way::Events { last_transfer, .. } = &mut self.way {
            let over = progress.done_bytes == progress.total_bytes;
            if over || last_transfer.is_none_or(|last| last.elapsed() >= TRANSFER_EVENT_INTERVAL) {
                *last_transfer = Some(Instant::now());
                return self.output.event(&Event::Transfer { subject, progress });
            }
            return Ok(());
        }
        self.show(subject, false, progress);
        Ok(())
    }

    /// Takes the bar away, so that what comes next stands in its place.
    pub fn finish(&mut self) {
        if let Way::Bar(bar) = &self.way {
            bar.finish_and_clear();
        }
    }

    fn show(&mut self, subject: &str, undoing: bool, progress: &Progress) {
        match &mut self.way {
            Way::Bar(bar) => draw(bar, undoing, progress),
            Way::Lines(lines) => {
                if let Some(line) = lines.line(subject, undoing, progress, Instant::now()) {
                    self.output.error(&line);
                }
            }
            Way::Events { .. } => {}
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.finish();
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
    // Until there is something to show, nothing is drawn: the library's own bar would flash.
    bar.set_style(ProgressStyle::with_template("").expect("the template is a constant"));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn draw(bar: &ProgressBar, undoing: bool, progress: &Progress) {
    let template = if progress.total_bytes > 0 {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes.min(progress.total_bytes));
        "   {prefix}  {bar:10}  {msg}"
    } else {
        " {spinner} {prefix}  {msg}"
    };
    bar.set_message(figures(progress).join("   "));
    bar.set_prefix(headline(undoing, progress));
    let style = ProgressStyle::with_template(template).expect("the template is a constant");
    bar.set_style(style.progress_chars("█░"));
}

/// `warm-up  round 3`.
fn headline(undoing: bool, progress: &Progress) -> String {
    let phase = if progress.phase.is_empty() { "working".to_owned() } else { plain(&progress.phase) };
    let mut text = if undoing { format!("undoing: {phase}") } else { phase };
    if progress.round > 0 {
        text.push_str(&format!("  round {}", progress.round));
    }
    text
}

/// Bytes, rate and what is left, each where it is known.
fn figures(progress: &Progress) -> Vec<String> {
    let mut figures = Vec::new();
    if progress.total_bytes > 0 {
        let (done, total) = (units::bytes(progress.done_bytes), units::bytes(progress.total_bytes));
        figures.push(format!("{done} of {total}"));
    } else if progress.done_bytes > 0 {
        figures.push(units::bytes(progress.done_bytes));
    }
    if progress.bytes_per_second > 0 {
        figures.push(format!("{}/s", units::bytes(progress.bytes_per_second)));
    }
    if progress.dirty_bytes_per_second > 0 {
        figures.push(format!("dirtying {}/s", units::bytes(progress.dirty_bytes_per_second)));
    }
    if let Some(left_ms) = progress.left_ms {
        figures.push(format!("left {}", units::left(left_ms)));
    }
    figures
}

/// Which lines a log gets: one for each phase and round, and now and then one in between.
#[derive(Default)]
struct Lines {
    last: Option<(String, Progress, Instant)>,
}

impl Lines {
    fn line(&mut self, subject: &str, undoing: bool, progress: &Progress, now: Instant) -> Option<String> {
        let headline = headline(undoing, progress);
        let wanted = match &self.last {
            None => true,
            Some((last, ..)) if *last != headline => true,
            Some((_, last, at)) => last != progress && now.duration_since(*at) >= LINE_INTERVAL,
        };
        if !wanted {
            return None;
        }
        let mut parts = vec![format!("{}: {headline}", plain(subject))];
        parts.extend(figures(progress));
        self.last = Some((headline, progress.clone(), now));
        Some(parts.join("  "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn warm_up(round: u64, done_mib: u64) -> Progress {
        Progress {
            phase: "warm-up".into(),
            done_bytes: done_mib * MIB,
            total_bytes: 2048 * MIB,
            bytes_per_second: 96 * MIB,
            round,
            dirty_bytes_per_second: 41 * MIB,
            left_ms: Some(3_400),
        }
    }

    #[test]
    fn a_log_gets_a_line_for_each_phase_and_round_and_no_more() {
        let start = Instant::now();
        let phase = |text: &str| Progress { phase: text.into(), ..Progress::default() };
        let scripted = [
            (0, phase("preparing")),
            (10, phase("preparing")),
            (20, warm_up(1, 0)),
            (1_000, warm_up(1, 500)),
            (5_030, warm_up(1, 812)),
            (5_040, warm_up(2, 900)),
            (9_000, phase("stop-and-copy")),
            (60_000, phase("stop-and-copy")),
        ];
        let mut lines = Lines::default();
        let said: Vec<String> = scripted
            .iter()
            .filter_map(|(at_ms, progress)| {
                lines.line("vm.migrate default/books", false, progress, start + Duration::from_millis(*at_ms))
            })
            .collect();
        let expected = [
            "vm.migrate default/books: preparing",
            "vm.migrate default/books: warm-up  round 1  0 B of 2.0 GiB  96 MiB/s  dirtying 41 MiB/s  left 4 s",
            "vm.migrate default/books: warm-up  round 1  812 MiB of 2.0 GiB  96 MiB/s  dirtying 41 MiB/s  left 4 s",
            "vm.migrate default/books: warm-up  round 2  900 MiB of 2.0 GiB  96 MiB/s  dirtying 41 MiB/s  left 4 s",
            "vm.migrate default/books: stop-and-copy",
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn undoing_is_said_and_an_empty_phase_is_not_a_hole() {
        assert_eq!(headline(true, &warm_up(1, 0)), "undoing: warm-up  round 1");
        assert_eq!(headline(false, &Progress::default()), "working");
        assert!(figures(&Progress::default()).is_empty());
    }
}
