//! A part of the work, for runs on several machines.

use std::env;
use std::fmt;
use std::str::FromStr;

use super::watch::Watcher;

/// The i-th of n parts, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shard {
    number: usize,
    of: usize,
    /// The scheduler that named it, if one did.
    engine: Option<&'static str>,
}

/// A scheduler that numbers its tasks, and the variables it tells them with.
struct Engine {
    title: &'static str,
    index: &'static str,
    /// The index of the first task.
    first: Option<&'static str>,
    /// The same, without such a variable.
    base: usize,
    count: Option<&'static str>,
}

/// The schedulers, by their documentation: Slurm (`job_array.html`), Kubernetes (indexed jobs), AWS Batch (array jobs),
/// Google Cloud Run (jobs), SkyPilot (managed job groups), HyperQueue (task arrays, which its examples count from 1).
const ENGINES: [Engine; 6] = [
    Engine {
        title: "Slurm",
        index: "SLURM_ARRAY_TASK_ID",
        first: Some("SLURM_ARRAY_TASK_MIN"),
        base: 0,
        count: Some("SLURM_ARRAY_TASK_COUNT"),
    },
    Engine {
        title: "Kubernetes",
        index: "JOB_COMPLETION_INDEX",
        first: None,
        base: 0,
        count: None,
    },
    Engine {
        title: "AWS Batch",
        index: "AWS_BATCH_JOB_ARRAY_INDEX",
        first: None,
        base: 0,
        count: Some("AWS_BATCH_JOB_ARRAY_SIZE"),
    },
    Engine {
        title: "Cloud Run",
        index: "CLOUD_RUN_TASK_INDEX",
        first: None,
        base: 0,
        count: Some("CLOUD_RUN_TASK_COUNT"),
    },
    Engine {
        title: "SkyPilot",
        index: "SKYPILOT_JOB_RANK",
        first: None,
        base: 0,
        count: Some("SKYPILOT_NUM_JOBS"),
    },
    Engine {
        title: "HyperQueue",
        index: "HQ_TASK_ID",
        first: None,
        base: 1,
        count: None,
    },
];
/// The distance between Slurm's indices, which has to be 1.
const STEP: &str = "SLURM_ARRAY_TASK_STEP";
/// The largest of Slurm's indices.
const LAST: &str = "SLURM_ARRAY_TASK_MAX";

impl Shard {
    /// Whether an item is of this part, by its place among all, counted from 0.
    pub(crate) fn has(self, place: usize) -> bool {
        place % self.of == self.number - 1
    }

    /// Its number, counted from 1, and that of all parts.
    pub(crate) fn numbers(self) -> (usize, usize) {
        (self.number, self.of)
    }

    /// The items of this part, where neighbours stay together.
    pub(crate) fn stretch<T>(self, items: Vec<T>) -> Vec<T> {
        let total = items.len();
        let [first, end] = [self.number - 1, self.number].map(|number| number * total / self.of);
        items.into_iter().take(end).skip(first).collect()
    }

    /// Says which part this is if a scheduler named it.
    pub(crate) fn announce(self, watcher: &mut Watcher) {
        if self.engine.is_some() {
            watcher.say(&self.to_string());
        }
    }

    /// The part that a scheduler's variables name, of `of` parts unless the scheduler says how many.
    fn auto(of: Option<usize>, variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let engine = ENGINES
            .iter()
            .find(|engine| variable(engine.index).is_some());
        let Some(engine) = engine else {
            let names: Vec<&str> = ENGINES.iter().map(|engine| engine.index).collect();
            return Err(format!("none of {} is set: give i/n", names.join(", ")));
        };
        let number = |name: &str| {
            let text = variable(name).unwrap_or_default();
            let number = text.trim().parse::<usize>();
            number.map_err(|_| format!("{name}: expected a number, found `{text}`"))
        };
        if engine.first.is_some() && variable(STEP).is_some_and(|step| step.trim() != "1") {
            return Err(format!("{STEP}: expected 1; give i/n"));
        }
        let first = match engine.first.filter(|first| variable(first).is_some()) {
            Some(first) => number(first)?,
            None => engine.base,
        };
        if first > 1 {
            let name = engine.first.unwrap_or_default();
            return Err(format!(
                "{name} is {first}: the array seems to be a part of another, so give i/n"
            ));
        }
        let index = number(engine.index)?;
        let count = match (of, engine.count.filter(|count| variable(count).is_some())) {
            (Some(of), _) => of,
            (None, Some(count)) => number(count)?,
            (None, None) => {
                let title = engine.title;
                return Err(format!(
                    "{title} does not say how many parts there are: give auto/n"
                ));
            }
        };
        let last = variable(LAST).and_then(|last| last.trim().parse::<usize>().ok());
        let has_gaps = last.is_some_and(|last| last.saturating_sub(first) + 1 != count);
        if of.is_none() && engine.first.is_some() && has_gaps {
            return Err(format!("{LAST} shows that the array has gaps: give auto/n"));
        }
        let place = index.checked_sub(first).filter(|place| *place < count);
        let place = place.ok_or_else(|| {
            format!(
                "{} is {index}, which is not one of {count} parts counted from {first}",
                engine.index
            )
        })?;
        Ok(Self {
            number: place + 1,
            of: count,
            engine: Some(engine.title),
        })
    }
}

impl Default for Shard {
    /// All of it.
    fn default() -> Self {
        Self {
            number: 1,
            of: 1,
            engine: None,
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "part {} of {}", self.number, self.of)?;
        match self.engine {
            Some(engine) => write!(f, ", as {engine} numbers it"),
            None => Ok(()),
        }
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let variable = |name: &str| env::var(name).ok();
        let invalid =
            || "expected i/n with i from 1 to n, such as 1/4, or auto, or auto/n".to_owned();
        if text == "auto" {
            return Self::auto(None, variable);
        }
        let (number, of) = text.split_once('/').ok_or_else(invalid)?;
        let of: usize = of.parse().ok().filter(|of| *of > 0).ok_or_else(invalid)?;
        if number == "auto" {
            return Self::auto(Some(of), variable);
        }
        let number = number
            .parse()
            .ok()
            .filter(|number| (1..=of).contains(number));
        Ok(Self {
            number: number.ok_or_else(invalid)?,
            of,
            engine: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(of: Option<usize>, variables: &[(&str, &str)]) -> Result<String, String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Shard::auto(of, variable).map(|shard| shard.to_string())
    }

    #[test]
    fn schedulers_count_each_in_its_way() {
        let slurm = [
            ("SLURM_ARRAY_TASK_ID", "7"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_MAX", "8"),
            ("SLURM_ARRAY_TASK_COUNT", "8"),
            ("SLURM_ARRAY_TASK_STEP", "1"),
        ];
        assert_eq!(
            auto(None, &slurm).unwrap(),
            "part 7 of 8, as Slurm numbers it"
        );
        for (index, count, title) in [
            (
                "AWS_BATCH_JOB_ARRAY_INDEX",
                "AWS_BATCH_JOB_ARRAY_SIZE",
                "AWS Batch",
            ),
            ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT", "Cloud Run"),
            ("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS", "SkyPilot"),
        ] {
            let found = auto(None, &[(index, "0"), (count, "8")]).unwrap();
            assert_eq!(found, format!("part 1 of 8, as {title} numbers it"));
        }
        let kubernetes = [("JOB_COMPLETION_INDEX", "7")];
        let found = auto(Some(8), &kubernetes).unwrap();
        assert_eq!(found, "part 8 of 8, as Kubernetes numbers it");
        let found = auto(Some(8), &[("HQ_TASK_ID", "8")]).unwrap();
        assert_eq!(found, "part 8 of 8, as HyperQueue numbers it");
    }

    #[test]
    fn what_a_scheduler_does_not_say_is_asked_for() {
        for (of, variables, expected) in [
            (
                None,
                &[][..],
                "none of SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX",
            ),
            (None, &[("JOB_COMPLETION_INDEX", "0")], "give auto/n"),
            (
                Some(4),
                &[("JOB_COMPLETION_INDEX", "4")],
                "not one of 4 parts",
            ),
            (
                Some(4),
                &[("HQ_TASK_ID", "0")],
                "not one of 4 parts counted from 1",
            ),
            (
                Some(4),
                &[("JOB_COMPLETION_INDEX", "x")],
                "expected a number, found `x`",
            ),
            (
                Some(4),
                &[("SLURM_ARRAY_TASK_ID", "3"), ("SLURM_ARRAY_TASK_STEP", "2")],
                "SLURM_ARRAY_TASK_STEP: expected 1",
            ),
            (
                Some(4),
                &[("SLURM_ARRAY_TASK_ID", "5"), ("SLURM_ARRAY_TASK_MIN", "1")],
                "not one of 4 parts counted from 1",
            ),
        ] {
            let message = auto(of, variables).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }

    /// Tasks that failed are sent again as an array of their own.
    #[test]
    fn a_part_of_an_array_is_not_taken_for_all_of_it() {
        let again = [
            ("SLURM_ARRAY_TASK_ID", "3"),
            ("SLURM_ARRAY_TASK_MIN", "3"),
            ("SLURM_ARRAY_TASK_COUNT", "1"),
        ];
        for of in [None, Some(8)] {
            assert!(auto(of, &again).unwrap_err().contains("give i/n"));
        }
        let gaps = [
            ("SLURM_ARRAY_TASK_ID", "3"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_MAX", "3"),
            ("SLURM_ARRAY_TASK_COUNT", "2"),
        ];
        assert!(auto(None, &gaps).unwrap_err().contains("give auto/n"));
        assert_eq!(
            auto(Some(8), &gaps).unwrap(),
            "part 3 of 8, as Slurm numbers it"
        );
    }

    #[test]
    fn parts_are_counted_from_one_and_share_everything() {
        let shards: Vec<Shard> = ["1/3", "2/3", "3/3"]
            .map(|text| text.parse().unwrap())
            .into();
        for place in 0..7 {
            assert_eq!(shards.iter().filter(|shard| shard.has(place)).count(), 1);
        }
        for total in 0..8 {
            let items: Vec<usize> = (0..total).collect();
            let stretches = shards.iter().map(|shard| shard.stretch(items.clone()));
            assert_eq!(stretches.collect::<Vec<_>>().concat(), items);
        }
        for text in ["0/3", "4/3", "1/0", "1", "/", "auto/0", "auto/x"] {
            let message = text.parse::<Shard>().unwrap_err();
            assert!(message.starts_with("expected i/n"), "{text}: {message}");
        }
    }
}
