//! Options where the API has fields: what a person typed is what an error should name.

use berth_model::{Problem, ProblemCode};

use crate::exit::Failure;

/// The same result, its problem told about the option instead of the field. A pair is a field of the API and the
/// option that it comes from, without dashes; a field with an index (`members.0`) goes with its list.
///
/// # Errors
/// Those of `result`.
pub fn named<T>(result: Result<T, Failure>, pairs: &[(&str, &str)]) -> Result<T, Failure> {
    result.map_err(|failure| match failure {
        Failure::Problem(problem) => Failure::Problem(Box::new(renamed(*problem, pairs))),
        other => other,
    })
}

fn renamed(mut problem: Problem, pairs: &[(&str, &str)]) -> Problem {
    let Some(field) = problem.field.clone() else { return problem };
    let head = field.split('.').next().unwrap_or_default();
    let Some((_, option)) = pairs.iter().find(|(known, _)| *known == head) else { return problem };
    if let Some(rest) = problem.message.strip_prefix(&format!("{field} is '")) {
        problem.message = format!("--{option} is '{rest}");
    }
    problem.field = Some((*option).to_owned());
    problem
}

/// A change that changes nothing: what can be given is said.
pub fn nothing_to_change(what: &str) -> Failure {
    let message = format!("there is nothing to change: give {what}");
    Problem::new(ProblemCode::InvalidInput, message).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_option_and_not_the_field() {
        let told = |problem: Problem| {
            let failed = named(Err::<(), _>(problem.into()), &[("members", "member"), ("for_s", "for")]);
            let failure = failed.expect_err("a failure");
            let problem = failure.problem().expect("a problem").clone();
            (problem.field.unwrap_or_default(), problem.message)
        };
        let (field, message) = told(Problem::field("members.1", "eve", "a user"));
        assert_eq!((field.as_str(), message.as_str()), ("member", "--member is 'eve': expected a user"));
        let (field, message) = told(Problem::field("for_s", 0, "1 to 9 seconds"));
        assert_eq!((field.as_str(), message.as_str()), ("for", "--for is '0': expected 1 to 9 seconds"));
        let (field, message) = told(Problem::not_found("segment", "x"));
        assert_eq!((field.as_str(), message.as_str()), ("segment", "there is no segment 'x'"));
        assert_eq!(nothing_to_change("--rename").code(), 2);
    }
}
