// SPDX-License-Identifier: Apache-2.0

package scheduler

// The methods of *ProfileTrace do nothing on nil: decisions are not traced then. A profile that runs twice, because
// its choice was taken by another request, keeps the trace of the last run.

func (s *Scheduler) newTrace(d *Decision, p *profile, ph Phase) *ProfileTrace {
	if !s.trace {
		return nil
	}
	d.Trace.Profiles = append(d.Trace.Profiles, ProfileTrace{Profile: p.name, Phase: ph})
	return &d.Trace.Profiles[len(d.Trace.Profiles)-1]
}

// begin makes a row for every endpoint: first those of w.rows, in their order, then those that never got there.
func (t *ProfileTrace) begin(p *profile, w *work) {
	if t == nil {
		return
	}
	n := len(p.scorers)
	t.Scorers = make([]string, n)
	for i := range p.scorers {
		t.Scorers[i] = p.scorers[i].name
	}
	scores := make([]float32, n*len(w.rows))
	t.Rows = make([]RowTrace, len(w.rows), len(w.rows)+len(w.dropped))
	for i := range w.rows {
		t.Rows[i] = RowTrace{Endpoint: w.rows[i].Endpoint, Scores: scores[i*n : (i+1)*n : (i+1)*n], Matched: w.rows[i].Matched[0]}
	}
	t.Rows = append(t.Rows, w.dropped...)
}

func (t *ProfileTrace) remove(cands []Candidate, by, reason string) {
	if t == nil {
		return
	}
	for i := range cands {
		r := &t.Rows[cands[i].index]
		r.RemovedBy, r.Reason, r.Scores = by, reason, nil
	}
}

func (t *ProfileTrace) score(scorer int, c *Candidate, v float64) {
	if t != nil {
		t.Rows[c.index].Scores[scorer] = float32(v)
	}
}

func (t *ProfileTrace) rank(cands []Candidate, n int) {
	if t == nil {
		return
	}
	for i := range cands {
		r := &t.Rows[cands[i].index]
		r.Total = cands[i].Score
		if i < n {
			r.Rank = i + 1
		}
	}
}
