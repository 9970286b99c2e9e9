"""The tables of a journal, and the views that answer questions about a run.

sqlite3 runs/quick/journal.sqlite "SELECT * FROM cost_ledger"

The candidates of a co-evolution are its architectures, then its optimizers. The place of an
evaluation is there that of its pair among those that the generation asked for, its JSON has both,
and its key is of both; what was known already is no row of ``saving``.
"""

from __future__ import annotations

__all__ = ["SCHEMA", "SCHEMA_VERSION"]

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE run (
    settings TEXT NOT NULL            -- JSON: all that the history of the run depends on
);

-- Every genome of every generation, as the search asked for it. After those of the population come
-- the candidates that its best genomes were refined with.
CREATE TABLE candidate (
    generation INTEGER NOT NULL,      -- counted from 0
    place INTEGER NOT NULL,           -- in the generation, elites first
    genome TEXT NOT NULL,             -- JSON
    key TEXT NOT NULL,                -- equal for genomes that are one optimizer
    score REAL,                       -- what the search was told; NULL: not yet
    status TEXT,                      -- of its worst run; NULL: not yet
    PRIMARY KEY (generation, place)
);
CREATE INDEX candidate_key ON candidate (key);

-- Every training run that was made.
CREATE TABLE evaluation (
    generation INTEGER,               -- that needed it first; NULL: after the search
    place INTEGER,                    -- in the generation; NULL: after the search
    genome TEXT NOT NULL,             -- JSON
    key TEXT NOT NULL,                -- as in candidate
    task TEXT NOT NULL,
    seed INTEGER NOT NULL,
    purpose TEXT NOT NULL,            -- search; audit: never stopped, as of finalists;
                                      -- report: never stopped, and tested
    status TEXT NOT NULL,             -- ok, stopped, diverged, crashed, timed_out, out_of_memory
    fitness REAL NOT NULL,            -- on the split that selects
    accuracy REAL,                    -- on the split that selects; NULL: not measured
    test_accuracy REAL,               -- NULL unless the purpose is report
    final_loss REAL,                  -- NULL: not measured
    steps INTEGER NOT NULL,           -- taken
    seconds REAL NOT NULL,
    data TEXT NOT NULL,               -- digest of the data set; empty: the worker was lost
    UNIQUE (key, task, seed, purpose)
);

-- Every training run of the search that was not made: with the rows of evaluation that belong to
-- a generation, one row for each of its genomes, tasks and seeds.
CREATE TABLE saving (
    generation INTEGER NOT NULL,
    place INTEGER NOT NULL,
    key TEXT NOT NULL,
    task TEXT NOT NULL,
    seed INTEGER NOT NULL,
    rule TEXT NOT NULL,               -- cache: made before for this optimizer; race: left out
    steps INTEGER NOT NULL,           -- cache: of the run made before; race: of the optimizer's
                                      -- run on this task with its first seed
    PRIMARY KEY (generation, place, task, seed)
);

-- The best genome of each generation.
CREATE VIEW best_per_generation AS
    SELECT generation, place, genome, key, score, status
    FROM (
        SELECT *, row_number() OVER (
            PARTITION BY generation
            ORDER BY status NOT IN ('ok', 'stopped'), score DESC, place
        ) AS position
        FROM candidate
        WHERE score IS NOT NULL
    )
    WHERE position = 1;

-- All training runs of the optimizer that a genome is, whichever genome they were made for:
--     SELECT * FROM trials_of_genome WHERE generation = 7 AND place = 0
CREATE VIEW trials_of_genome AS
    SELECT
        candidate.generation, candidate.place, candidate.key, purpose, task, seed,
        evaluation.status, fitness, accuracy, test_accuracy, final_loss, steps, seconds,
        evaluation.generation AS trained_in_generation, evaluation.place AS trained_in_place
    FROM candidate JOIN evaluation ON evaluation.key = candidate.key;

-- The genomes that hurdle or race stopped, in each generation that they were stopped in; not those
-- that failed.
CREATE VIEW stopped_genome AS
    SELECT generation, min(place) AS place, key, min(rule) AS rule
    FROM (
        SELECT generation, place, key, 'race' AS rule FROM saving WHERE rule = 'race'
        UNION ALL
        SELECT generation, place, key, 'hurdle' FROM evaluation
        WHERE purpose = 'search' AND status = 'stopped'
    ) JOIN candidate USING (generation, place, key)
    WHERE candidate.status IN ('ok', 'stopped')
    GROUP BY generation, key;

-- What the run cost in training steps, and what each rule saved. The factor is by how much the
-- search would have cost more without the rule. "search" is the search as a whole: what cache,
-- hurdle and race saved together; not divergence, where the source system stops too. "refinement"
-- is the part of the search that its candidates cost; it is there only where there are any.
CREATE VIEW cost_ledger AS
    WITH
        planned AS (
            SELECT
                json_extract(settings, '$.steps') AS steps,
                json_extract(settings, '$.population') AS population
            FROM run
        ),
        ended AS (
            SELECT
                CASE status WHEN 'stopped' THEN 'hurdle' ELSE 'divergence' END AS rule,
                evaluation.steps AS taken,
                planned.steps - evaluation.steps AS saved
            FROM evaluation, planned
            WHERE purpose = 'search' AND status IN ('stopped', 'diverged')
            UNION ALL
            SELECT rule, 0, steps FROM saving
        ),
        rules (rule) AS (VALUES ('cache'), ('hurdle'), ('race'), ('divergence')),
        purposes (rule) AS (VALUES ('search'), ('audit'), ('report')),
        by_rule AS (
            SELECT
                rule, count(saved) AS runs, total(taken) AS taken, total(saved) AS saved
            FROM rules LEFT JOIN ended USING (rule)
            GROUP BY rule
        ),
        by_purpose AS (
            SELECT
                rule, count(steps) AS runs, total(steps) AS taken,
                CASE rule
                    WHEN 'search'
                    THEN (SELECT total(saved) FROM by_rule WHERE rule <> 'divergence')
                    ELSE 0
                END AS saved
            FROM purposes LEFT JOIN evaluation ON purpose = rule
            GROUP BY rule
        ),
        refinement AS (
            SELECT
                'refinement' AS rule, count(*) AS runs, total(evaluation.steps) AS taken, 0 AS saved
            FROM evaluation, planned
            WHERE purpose = 'search' AND place >= population
            GROUP BY purpose
        )
    SELECT
        rule, runs,
        CAST(taken AS INTEGER) AS steps_taken,
        CAST(saved AS INTEGER) AS steps_saved,
        1.0 + saved / (SELECT taken FROM by_purpose WHERE rule = 'search') AS factor
    FROM (
        SELECT * FROM by_purpose
        UNION ALL SELECT * FROM refinement
        UNION ALL SELECT * FROM by_rule
    )
    ORDER BY instr('search refinement cache hurdle race divergence audit report', rule);
"""
