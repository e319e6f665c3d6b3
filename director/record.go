// SPDX-License-Identifier: Apache-2.0

package director

import (
	"strings"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/scheduler"
)

// Record explains one finished request: what GET /debug/decisions shows. It never holds prompt text.
type Record struct {
	Time         time.Time         `json:"time"`
	RequestID    string            `json:"request_id"`
	Model        string            `json:"model"`
	API          string            `json:"api"`
	PromptTokens int               `json:"prompt_tokens"` // estimated
	PromptBlocks int               `json:"prompt_blocks"` // prefix blocks of the default producer
	Outcome      string            `json:"outcome"`
	Error        string            `json:"error,omitempty"`
	Profiles     []ProfileRecord   `json:"profiles"`
	Picks        map[string]string `json:"picks"`   // phase → endpoint; of encode all who worked, with commas
	Reasons      map[string]string `json:"reasons"` // phase → why it ran or not
	Attempts     []AttemptRecord   `json:"attempts"`
	Checkpoint   string            `json:"checkpoint"`
	Leaked       string            `json:"leaked,omitempty"` // why nobody claims the blocks of a finished prefill
	Status       int               `json:"status"`           // of the response, 0 where it was not seen
	Served       string            `json:"served"`           // ip:port the gateway reported
	Seconds      SecondsRecord     `json:"seconds"`
}

// ProfileRecord is one profile's run.
type ProfileRecord struct {
	Profile   string           `json:"profile"`
	Phase     string           `json:"phase"`
	Scorers   []string         `json:"scorers"`
	Endpoints []EndpointRecord `json:"endpoints"`
}

// EndpointRecord is what happened to one endpoint in a profile.
type EndpointRecord struct {
	Endpoint  string    `json:"endpoint"`
	Address   string    `json:"address"`
	RemovedBy string    `json:"removed_by"` // the filter; empty when it was scored
	Reason    string    `json:"reason"`
	Scores    []float32 `json:"scores"` // one per scorer, 0–1, before weights
	Total     float64   `json:"total"`
	Rank      int       `json:"rank"` // from 1; 0 when it was not ranked
	Matched   int32     `json:"matched_blocks"`
}

// AttemptRecord is one sub-request.
type AttemptRecord struct {
	Phase    string  `json:"phase"`
	Endpoint string  `json:"endpoint"`
	Attempt  int     `json:"attempt"` // from 1
	Status   int     `json:"status"`
	Reason   string  `json:"reason"`
	Error    string  `json:"error,omitempty"` // what broke, at most 200 bytes
	Seconds  float64 `json:"seconds"`
}

// SecondsRecord are the request's times, in seconds from its first byte.
type SecondsRecord struct {
	Schedule  float64 `json:"schedule"`   // until the picks were made
	Encode    float64 `json:"encode"`     // spent in the encode phase, whose sub-requests overlap
	Prefill   float64 `json:"prefill"`    // spent in prefill sub-requests
	Decision  float64 `json:"decision"`   // until the answer
	FirstByte float64 `json:"first_byte"` // until response headers; 0 where they were not seen
	Total     float64 `json:"total"`
}

// newRefusal explains a request for which nothing was picked: the error names what each filter removed.
func newRefusal(req *inference.Request, start time.Time, err error) *Record {
	return &Record{
		Time: start, RequestID: req.ID, Model: req.Model, API: req.API.String(), PromptTokens: req.PromptTokens(), Error: err.Error(),
		Picks: map[string]string{}, Reasons: map[string]string{}, Attempts: []AttemptRecord{}, Profiles: []ProfileRecord{},
		Seconds: SecondsRecord{Total: time.Since(start).Seconds()},
	}
}

func newRecord(x *Exchange, now time.Time) *Record {
	r := &Record{
		Time: x.start, RequestID: x.req.ID, Model: x.req.Model, API: x.req.API.String(), PromptTokens: x.req.PromptTokens(),
		PromptBlocks: x.decision.Prompt.Blocks, Status: x.status, Served: x.served,
		Picks: map[string]string{}, Reasons: map[string]string{}, Attempts: []AttemptRecord{}, Profiles: []ProfileRecord{},
		Seconds: SecondsRecord{Schedule: x.scheduled.Seconds(), Decision: x.decided.Seconds(), Total: now.Sub(x.start).Seconds()},
	}
	if !x.firstByte.IsZero() {
		r.Seconds.FirstByte = x.firstByte.Sub(x.start).Seconds()
	}
	for phase := scheduler.PhaseDecode; phase <= scheduler.PhasePrefill; phase++ {
		if pick := x.decision.Phase(phase); pick.Reason != "" {
			r.Reasons[phase.String()] = pick.Reason
		}
	}
	r.Picks["decode"] = x.decode.ID()
	if x.err != nil {
		r.Error = x.err.Error()
	}
	if x.outcome != nil {
		recordOutcome(r, x)
	}
	for i := range x.decision.Trace.Profiles {
		r.Profiles = append(r.Profiles, newProfileRecord(&x.decision.Trace.Profiles[i]))
	}
	return r
}

func recordOutcome(r *Record, x *Exchange) {
	r.Outcome, r.Checkpoint = x.outcome.Name, x.outcome.Checkpoint.String()
	r.Leaked = x.outcome.Leaked
	if x.outcome.Prefiller != nil {
		r.Picks["prefill"] = x.outcome.Prefiller.ID()
	}
	if len(x.outcome.Encoders) > 0 {
		ids := make([]string, len(x.outcome.Encoders))
		for i, e := range x.outcome.Encoders {
			ids[i] = e.ID()
		}
		r.Picks["encode"] = strings.Join(ids, ",")
	}
	if why := x.outcome.WayReason; why != "" { // the decider's word stays: it wanted otherwise
		if wanted := r.Reasons["prefill"]; wanted != "" {
			why = wanted + "; " + why
		}
		r.Reasons["prefill"] = why
	}
	if x.outcome.EncodeReason != "" {
		r.Reasons["encode"] = x.outcome.EncodeReason
	}
	r.Seconds.Encode = x.outcome.EncodeTime.Seconds()
	for i := range x.outcome.Attempts {
		a := &x.outcome.Attempts[i]
		if a.Phase == scheduler.PhasePrefill {
			r.Seconds.Prefill += a.Duration.Seconds()
		}
		r.Attempts = append(r.Attempts, AttemptRecord{
			Phase: a.Phase.String(), Endpoint: a.Endpoint.ID(), Attempt: a.Number, Status: a.Status, Reason: a.Reason,
			Error: a.Error, Seconds: a.Duration.Seconds(),
		})
	}
}

func newProfileRecord(t *scheduler.ProfileTrace) ProfileRecord {
	p := ProfileRecord{Profile: t.Profile, Phase: t.Phase.String(), Scorers: t.Scorers, Endpoints: make([]EndpointRecord, 0, len(t.Rows))}
	for i := range t.Rows {
		row := &t.Rows[i]
		p.Endpoints = append(p.Endpoints, EndpointRecord{
			Endpoint: row.Endpoint.ID(), Address: row.Endpoint.Hostport, RemovedBy: row.RemovedBy, Reason: row.Reason,
			Scores: row.Scores, Total: row.Total, Rank: row.Rank, Matched: row.Matched,
		})
	}
	return p
}
