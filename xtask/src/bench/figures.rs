//! What was measured, by name: medians and worsts, bars, peers, the table and the JSON.

use serde_json::{Map, Value, json};

/// What a figure must reach.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// The figure's name.
    pub name: &'static str,
    /// What its median must keep to.
    pub bound: Bound,
    /// What it is.
    pub meaning: &'static str,
}

/// A bound of a figure.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    /// At most so much.
    Most(f64),
    /// At least so much.
    Least(f64),
}

impl Bound {
    fn holds(self, figure: f64) -> bool {
        match self {
            Self::Most(most) => figure <= most,
            Self::Least(least) => figure >= least,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Most(most) => short(most),
            Self::Least(least) => format!(">={}", short(least)),
        }
    }
}

/// One thing measured several times.
#[derive(Debug, Clone)]
struct Row {
    name: String,
    /// Whose it is: none for ours.
    peer: Option<String>,
    meaning: String,
    samples: Vec<f64>,
}

/// All that was measured, in the order in which it was.
#[derive(Debug, Default)]
pub struct Figures {
    rows: Vec<Row>,
    failures: usize,
}

impl Figures {
    /// Keeps what was measured, and says it at once. Nothing measured, nothing kept.
    pub fn add(&mut self, name: &str, meaning: &str, samples: &[f64]) {
        self.keep(Row {
            name: name.to_owned(),
            peer: None,
            meaning: meaning.to_owned(),
            samples: samples.to_vec(),
        });
    }

    /// Keeps what a peer reached for the figure of this name: `who` says the peer and its way, in a name's letters.
    pub fn add_peer(&mut self, name: &str, who: &str, meaning: &str, samples: &[f64]) {
        let peer = Some(who.to_owned());
        self.keep(Row {
            name: name.to_owned(),
            peer,
            meaning: meaning.to_owned(),
            samples: samples.to_vec(),
        });
    }

    fn keep(&mut self, row: Row) {
        if row.samples.is_empty() {
            return;
        }
        let each: Vec<String> = row.samples.iter().map(|sample| short(*sample)).collect();
        println!("   {:<44} {:>10}   [{}]", row.key(), short(median(&row.samples)), each.join(" "));
        self.rows.push(row);
    }

    /// Counts a part that failed.
    pub fn failed(&mut self) {
        self.failures += 1;
    }

    /// How many parts failed.
    pub fn failures(&self) -> usize {
        self.failures
    }

    /// The median of ours of this name.
    pub fn median(&self, name: &str) -> Option<f64> {
        self.ours(name).map(|row| median(&row.samples))
    }

    /// All samples of ours of this name.
    pub fn samples(&self, name: &str) -> Option<Vec<f64>> {
        self.ours(name).map(|row| row.samples.clone())
    }

    /// The median of what this peer reached for the figure of this name.
    pub fn peer_median(&self, name: &str, who: &str) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.peer.as_deref() == Some(who) && row.name == name);
        row.map(|row| median(&row.samples))
    }

    fn ours(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.peer.is_none() && row.name == name)
    }

    /// The peer that did best: that is the one to be held against.
    fn best_peer(&self, name: &str) -> Option<&Row> {
        let peers = self.rows.iter().filter(|row| row.peer.is_some() && row.name == name);
        peers.min_by(|one, other| median(&one.samples).total_cmp(&median(&other.samples)))
    }

    /// Flat, name to number: the median under the name, the worst beside it; the best peer as `peer_NAME`, and each
    /// peer by its own name.
    pub fn json(&self) -> Value {
        let mut object = Map::new();
        let mut put = |key: &str, samples: &[f64]| {
            object.insert(key.to_owned(), json!(rounded(median(samples))));
            if samples.len() > 1 {
                object.insert(format!("{key}_worst"), json!(rounded(worst(samples))));
            }
        };
        for row in &self.rows {
            put(&row.key(), &row.samples);
            if row.peer.is_none()
                && let Some(best) = self.best_peer(&row.name)
            {
                put(&format!("peer_{}", row.name), &best.samples);
            }
        }
        Value::Object(object)
    }

    /// The table with the bars, then everything else.
    pub fn print(&self, bars: &[Bar]) {
        println!(
            "\n{:<32} {:>9} {:>9} {:>7}  {:<6} peer's median (worst)",
            "figure", "median", "worst", "bar", ""
        );
        for bar in bars {
            println!("{}", self.line(bar));
        }
        println!("\nbesides");
        for row in
            self.rows.iter().filter(|row| row.peer.is_some() || !bars.iter().any(|bar| bar.name == row.name))
        {
            let (middle, worst) = (short(median(&row.samples)), short(worst(&row.samples)));
            println!("{:<44} {middle:>10} {worst:>10}  {}", row.key(), row.meaning);
        }
    }

    fn line(&self, bar: &Bar) -> String {
        let name = bar.name;
        let Some(row) = self.ours(name) else {
            return format!(
                "{name:<32} {:>9} {:>9} {:>7}  {:<6} {}",
                "-",
                "-",
                bar.bound.text(),
                "none",
                bar.meaning
            );
        };
        let (middle, worst) = (median(&row.samples), worst(&row.samples));
        let verdict = if bar.bound.holds(middle) { "pass" } else { "MISSED" };
        let peer = self.best_peer(name).map_or_else(String::new, |peer| {
            let (middle, worst) = (short(median(&peer.samples)), short(self::worst(&peer.samples)));
            format!("{middle} ({worst}) {}", peer.peer.as_deref().unwrap_or_default())
        });
        let (middle, worst, most) = (short(middle), short(worst), bar.bound.text());
        format!("{name:<32} {middle:>9} {worst:>9} {most:>7}  {verdict:<6} {peer}").trim_end().to_owned()
    }
}

impl Row {
    fn key(&self) -> String {
        self.peer.as_ref().map_or_else(|| self.name.clone(), |who| format!("peer_{who}_{}", self.name))
    }
}

/// The middle one; of an even number the mean of the middle two.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// The largest: smaller is better in all that is measured here.
fn worst(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::NAN, f64::max)
}

/// Three digits after the point are more than any of this is good for.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 1000.0 || value.fract() == 0.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_stands_under_the_name_and_the_worst_beside_it() {
        let mut figures = Figures::default();
        figures.add("pause_ms", "", &[9.0, 1.0, 4.0]);
        figures.add("once", "", &[2.5]);
        figures.add("never", "", &[]);
        figures.add_peer("pause_ms", "slow", "", &[700.0, 800.0]);
        figures.add_peer("pause_ms", "fast", "", &[500.0, 900.0, 520.0]);
        let expected = json!({
            "pause_ms": 4.0, "pause_ms_worst": 9.0, "once": 2.5,
            "peer_pause_ms": 520.0, "peer_pause_ms_worst": 900.0,
            "peer_slow_pause_ms": 750.0, "peer_slow_pause_ms_worst": 800.0,
            "peer_fast_pause_ms": 520.0, "peer_fast_pause_ms_worst": 900.0,
        });
        assert_eq!(figures.json(), expected);
    }

    #[test]
    fn a_median_above_the_bar_is_called_missed_and_what_was_not_taken_none() {
        let mut figures = Figures::default();
        let bar = Bar { name: "pause_ms", bound: Bound::Most(5.0), meaning: "" };
        assert!(figures.line(&bar).contains("none"));
        figures.add("pause_ms", "", &[5.0, 5.0, 60.0]);
        assert!(figures.line(&bar).contains("pass"));
        let bar = Bar { bound: Bound::Most(4.9), ..bar };
        assert!(figures.line(&bar).contains("MISSED"));
    }
}
