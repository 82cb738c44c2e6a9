//! Variables that python itself reads. It reads most of them when it starts, which is before a job's variables are
//! there, so those that can be applied later are applied by the prescript, and the others are refused: none is
//! without effect silently.

/// What a variable has no effect on, and what to do instead.
const REFUSED: &[(&str, &str)] = &[
    ("PYTHONASYNCIODEBUG", "give `debug=True` to `asyncio.run`"),
    ("PYTHONCOERCECLOCALE", LEAVE),
    ("PYTHONDEBUG", LEAVE),
    ("PYTHONDEVMODE", "set what it stands for: PYTHONWARNINGS=default, PYTHONFAULTHANDLER=1"),
    ("PYTHONDUMPREFS", LEAVE),
    ("PYTHONEXECUTABLE", LEAVE),
    ("PYTHONHASHSEED", "have the program sort what must not depend on the order of a set"),
    ("PYTHONHOME", LEAVE),
    ("PYTHONINSPECT", LEAVE),
    ("PYTHONMALLOC", LEAVE),
    ("PYTHONMALLOCSTATS", LEAVE),
    ("PYTHONNODEBUGRANGES", LEAVE),
    ("PYTHONOPTIMIZE", "compile with `optimize=` what needs it"),
    ("PYTHONPERFSUPPORT", LEAVE),
    ("PYTHONPLATLIBDIR", LEAVE),
    ("PYTHONPROFILEIMPORTTIME", LEAVE),
    ("PYTHONVERBOSE", LEAVE),
    ("PYTHONWARNDEFAULTENCODING", "set PYTHONWARNINGS, and name an encoding where a file is opened"),
    ("PYTHON_CONTEXT_AWARE_WARNINGS", LEAVE),
    ("PYTHON_CPU_COUNT", "ask for `limits.cpus`"),
    ("PYTHON_DISABLE_REMOTE_DEBUG", LEAVE),
    ("PYTHON_FROZEN_MODULES", LEAVE),
    ("PYTHON_GIL", LEAVE),
    ("PYTHON_JIT", LEAVE),
    ("PYTHON_PERF_JIT_SUPPORT", LEAVE),
    ("PYTHON_PRESITE", LEAVE),
    ("PYTHON_THREAD_INHERIT_CONTEXT", LEAVE),
    ("PYTHON_TLBC", LEAVE),
];
const LEAVE: &str = "leave it out";

/// The most that python takes.
const DIGITS_MAX: u32 = i32::MAX.cast_unsigned();
const FRAMES_MAX: u32 = 65_535;

/// What is wrong with a variable of a job, for its publisher.
///
/// # Errors
/// It has no effect here, or not with this value.
pub(super) fn check(name: &str, value: &str) -> Result<(), String> {
    // To python, an empty one is none.
    if value.is_empty() {
        return Ok(());
    }
    let refused = |remedy: &str| {
        Err(format!(
            "`env.{name}` has no effect: python reads it when it starts, before a job's variables are there; {remedy}"
        ))
    };
    let number = |least: u32, most: u32| value.parse().is_ok_and(|number| (least..=most).contains(&number));
    match name {
        "PYTHONUTF8" if value != "1" => refused("give the encoding where a file is opened"),
        "PYTHONINTMAXSTRDIGITS" if value != "0" && !number(640, DIGITS_MAX) => Err(format!(
            "`env.{name}` must be a number of digits from 640 to {DIGITS_MAX}, or 0 for no limit"
        )),
        "PYTHONTRACEMALLOC" if !number(0, FRAMES_MAX) => {
            Err(format!("`env.{name}` must be a number of frames from 0 to {FRAMES_MAX}, such as 25"))
        }
        _ => match REFUSED.iter().find(|(known, _)| *known == name) {
            Some((_, remedy)) => refused(remedy),
            None => Ok(()),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn a_variable_without_effect_is_named_with_its_remedy() {
        let refused = check("PYTHONHASHSEED", "0").unwrap_err();
        assert!(refused.contains("`env.PYTHONHASHSEED`") && refused.contains("sort"), "{refused}");
        for (name, value) in [
            ("PYTHONUTF8", "0"),
            ("PYTHONINTMAXSTRDIGITS", "639"),
            ("PYTHONINTMAXSTRDIGITS", "2147483648"),
            ("PYTHONTRACEMALLOC", "yes"),
            ("PYTHONTRACEMALLOC", "65536"),
        ] {
            assert!(check(name, value).unwrap_err().contains(name));
        }
        for (name, value) in [
            ("PYTHONHASHSEED", ""),
            ("PYTHONUTF8", "1"),
            ("PYTHONINTMAXSTRDIGITS", "0"),
            ("PYTHONTRACEMALLOC", "25"),
            ("PYTHONPATH", "src"),
            ("PYTHON_VERSION", "3.11"),
            ("pythonhashseed", "0"),
        ] {
            assert_eq!(check(name, value), Ok(()), "{name}");
        }
    }
}
