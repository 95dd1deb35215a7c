use std::cell::{Cell, RefCell};
use std::fs;
use std::path::Path;

use super::*;

fn pause(reason: &str) -> Command {
    Command::Pause { reason: reason.into() }
}

/// Answers one after the other; panics when asked once more.
fn script(commands: Vec<Command>) -> impl Control {
    let mut rest = commands.into_iter();
    move |_: u64| rest.next().expect("asked after the end")
}

/// What `run_paused` does with these answers: how it ends, what it tells, and how often it sleeps.
fn play(commands: Vec<Command>) -> (Flow, Vec<PauseEvent>, usize) {
    let (mut events, mut sleeps) = (Vec::new(), 0);
    let flow = run_paused(&mut script(commands), 7, |_| sleeps += 1, |event| events.push(event.clone()));
    (flow, events, sleeps)
}

#[test]
fn a_pause_is_told_once_and_ends() {
    assert_eq!(play(vec![Command::Continue]), (Flow::Run, vec![], 0));
    assert_eq!(play(vec![Command::Stop]), (Flow::Stop, vec![], 0));
    let paused = |reason: &str| PauseEvent::Paused { reason: reason.into() };
    assert_eq!(
        play(vec![pause("hot"), pause("hot"), pause("file"), Command::Continue]),
        (Flow::Run, vec![paused("hot"), paused("file"), PauseEvent::Resumed { waited: Duration::from_secs(3) }], 3)
    );
    assert_eq!(play(vec![pause("hot"), Command::Stop]), (Flow::Stop, vec![paused("hot")], 1));
}

#[test]
fn a_file_pauses_while_it_exists() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("PAUSE");
    let mut control = PauseFile::new(&path);
    assert_eq!(control.poll(0), Command::Continue);
    fs::write(&path, "").unwrap();
    assert_eq!(control.poll(1), pause(&format!("the file {} exists", path.display())));
    fs::remove_file(&path).unwrap();
    assert_eq!(control.poll(2), Command::Continue);
}

#[test]
fn several_controls_are_one() {
    let all = |commands: Vec<Command>| {
        All(commands.into_iter().map(|c| Box::new(script(vec![c])) as Box<dyn Control>).collect()).poll(0)
    };
    assert_eq!(all(vec![]), Command::Continue);
    assert_eq!(all(vec![Command::Continue, pause("a"), pause("b")]), pause("a; b"));
    assert_eq!(all(vec![pause("a"), Command::Stop]), Command::Stop);
}

#[test]
fn a_control_is_asked_at_most_once_a_second() {
    let time = Cell::new(Duration::ZERO);
    let asked = RefCell::new(Vec::new());
    let inner = |step: u64| {
        asked.borrow_mut().push(step);
        if step < 3 { Command::Continue } else { pause("late") }
    };
    let mut control = Throttled::new(inner, || time.get());
    let mut answers = Vec::new();
    for step in 0..6 {
        answers.push(control.poll(step));
        time.set(time.get() + Duration::from_millis(400));
    }
    assert_eq!(*asked.borrow(), [0, 3]);
    assert_eq!(answers[..3], vec![Command::Continue; 3]);
    assert_eq!(answers[3..], vec![pause("late"); 3]);
}

fn put(root: &Path, path: &str, content: &str) {
    let path = root.join("class").join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("{content}\n")).unwrap();
}

const LIMITS: PowerLimits = PowerLimits { max_celsius: 80.0, hysteresis: 10.0, min_battery_percent: 20 };

#[test]
fn heat_pauses_until_it_is_cool() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    put(root, "thermal/thermal_zone0/type", "cpu");
    put(root, "thermal/thermal_zone0/temp", "45000");
    // Acts at 75 degrees, so that 70 is the limit; a passive point and one that is not set count for nothing.
    put(root, "thermal/thermal_zone1/type", "modem");
    put(root, "thermal/thermal_zone1/temp", "45000");
    for (index, kind, temp) in [(0, "passive", "50000"), (1, "critical", "75000"), (2, "hot", "0")] {
        put(root, &format!("thermal/thermal_zone1/trip_point_{index}_type"), kind);
        put(root, &format!("thermal/thermal_zone1/trip_point_{index}_temp"), temp);
    }
    put(root, "thermal/thermal_zone2/temp", "-274000");
    put(root, "thermal/cooling_device0/temp", "99000");
    let mut control = PowerAndHeat::at(root, LIMITS).unwrap();
    assert!(!control.is_blind());
    assert_eq!(control.describe(), "thermal_zone0 (cpu) up to 80 C, thermal_zone1 (modem) up to 70 C");
    let mut at = |zone: usize, temp: &str| {
        put(root, &format!("thermal/thermal_zone{zone}/temp"), temp);
        control.poll(0)
    };
    assert_eq!(at(0, "80000"), Command::Continue);
    let hot = pause("thermal_zone0 (cpu) was above 80 C and must cool below 70 C");
    assert_eq!(at(0, "80001"), hot);
    assert_eq!(at(0, "70000"), hot);
    assert_eq!(at(0, "69999"), Command::Continue);
    assert_eq!(at(0, "79000"), Command::Continue);
    assert_eq!(at(1, "71000"), pause("thermal_zone1 (modem) was above 70 C and must cool below 60 C"));
    assert_eq!(at(1, "not a number"), Command::Continue);
}

#[test]
fn a_low_battery_pauses_until_it_charges() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for (name, kind, status) in [("AC", "Mains", "x"), ("BAT0", "Battery", "Discharging"), ("mouse", "Battery", "Full")]
    {
        put(root, &format!("power_supply/{name}/type"), kind);
        put(root, &format!("power_supply/{name}/status"), status);
        put(root, &format!("power_supply/{name}/capacity"), "20");
    }
    put(root, "power_supply/mouse/scope", "Device");
    let mut control = PowerAndHeat::at(root, LIMITS).unwrap();
    assert_eq!(control.describe(), "BAT0 from 20%");
    assert_eq!(control.poll(0), Command::Continue);
    put(root, "power_supply/BAT0/capacity", "19");
    assert_eq!(control.poll(1), pause("BAT0 is below 20% and not charging"));
    put(root, "power_supply/BAT0/status", "Charging");
    assert_eq!(control.poll(2), Command::Continue);
}

#[test]
fn a_device_without_sensors_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut control = PowerAndHeat::at(folder.path(), LIMITS).unwrap();
    assert!(control.is_blind());
    assert!(control.describe().starts_with("no sensors here"));
    assert_eq!(control.poll(0), Command::Continue);
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let check = |limits: PowerLimits, expected: &str| {
        let error = PowerAndHeat::at(Path::new("/nowhere"), limits).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(PowerLimits { max_celsius: f64::NAN, ..LIMITS }, "temperature to pause at");
    check(PowerLimits { hysteresis: -1.0, ..LIMITS }, "degrees to cool down by");
    check(PowerLimits { min_battery_percent: 101, ..LIMITS }, "expected a percentage, found 101");
}
