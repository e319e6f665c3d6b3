// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Faults are what goes wrong on one engine. They are read from JSON by POST /admin/faults, which replaces all of them.
type Faults struct {
	Rules         []Fault `json:"rules,omitempty"`           // the first that matches a request is injected
	Metrics       string  `json:"metrics,omitempty"`         // see [MetricsFaults]
	Encoder       string  `json:"encoder,omitempty"`         // what an encoder answers those who read from it: a NACK kind, "silent" or "stall"
	KVEvents      string  `json:"kv_events,omitempty"`       // what happens to messages of KV events; see [KVEventFaults]
	KVEventsEvery int     `json:"kv_events_every,omitempty"` // to one message in so many; default 1: to each
	Refuse        bool    `json:"refuse,omitempty"`          // the listener is closed: connections are refused
}

// Fault breaks some generation requests in one way.
type Fault struct {
	// Which requests. Phase: "prefill" (do_remote_decode), "transfer" (with a handle), "plain", "decode" (all but
	// prefill), "query" (of a bootstrap server), "" or "any".
	Phase       string  `json:"phase,omitempty"`
	Probability float64 `json:"probability,omitempty"` // 0 is always
	Next        int     `json:"next,omitempty"`        // only the next N requests that match; 0 is without end
	RequestID   string  `json:"request_id,omitempty"`  // only this X-Request-Id
	Attempt     string  `json:"attempt,omitempty"`     // only this X-Processor-Attempt

	// What happens; see [FaultKinds].
	Kind string `json:"kind"`
	Late bool   `json:"late,omitempty"` // after the work is done and before the answer: prefill blocks are pinned then

	// How.
	Status         int    `json:"status,omitempty"`           // of "status"; default 503
	Body           string `json:"body,omitempty"`             // of "status"; default the engine's own error object
	RetryAfter     string `json:"retry_after,omitempty"`      // header of "status"; default 1 for 429, "-" is none
	After          int    `json:"after,omitempty"`            // stream events sent before a stream breaks; default 1
	BytesPerSecond int    `json:"bytes_per_second,omitempty"` // of "slow_body"; default 1024
	DelayMS        int    `json:"delay_ms,omitempty"`         // of "delay", scaled; milliseconds
	Size           int    `json:"size,omitempty"`             // of "huge_body", bytes; default 8 MiB
	Bytes          int    `json:"bytes,omitempty"`            // of "split_sse": bytes of each write, whatever they belong to; default 1
	At             string `json:"at,omitempty"`               // of "die": the checkpoint, see [Checkpoints]; default arrival
	RestartMS      int    `json:"restart_ms,omitempty"`       // of "die": when the process starts again, real milliseconds; 0 is never

	left *int // of Next, shared by copies
}

// Kinds of faults.
const (
	faultResetBefore   = "reset_before_headers"
	faultResetAfter    = "reset_after_headers"
	faultResetMid      = "reset_mid_stream"
	faultHang          = "hang"
	faultHangMid       = "hang_mid_body"
	faultDelay         = "delay"
	faultSlow          = "slow_body"
	faultStatus        = "status"
	faultMalformed     = "malformed_json"
	faultTruncated     = "truncated_json"
	faultHuge          = "huge_body"
	faultContentType   = "content_type"
	faultNoHandle      = "no_handle"
	faultOddHandle     = "odd_handle"
	faultTruncatedSSE  = "truncated_sse"
	faultSplitSSE      = "split_sse"
	faultFinishError   = "finish_error"
	faultDie           = "die"
	metricsFrozen      = "frozen"
	metricsHang        = "hang"
	metricsNaN         = "nan"
	metricsMissing     = "missing"
	metricsServerError = "500"

	metricsContradictory = "contradictory"

	kvDrop      = "drop"
	kvDuplicate = "duplicate"
	kvReorder   = "reorder"
)

// MetricsFaults lists the values of [Faults.Metrics] with what each does.
func MetricsFaults() map[string]string {
	return map[string]string{
		metricsFrozen:        "the page stays as it is, over restarts too",
		metricsHang:          "no answer until the scraper leaves",
		metricsNaN:           "load gauges are NaN",
		metricsMissing:       "no load gauges",
		metricsContradictory: "load gauges out of range and at odds with each other",
		metricsServerError:   "status 500",
	}
}

// KVEventFaults lists the values of [Faults.KVEvents] with what each does.
func KVEventFaults() map[string]string {
	return map[string]string{
		kvDrop:      "not sent; a replay has it",
		kvDuplicate: "sent twice",
		kvReorder:   "sent after the one that follows it",
	}
}

// FaultKinds lists the values of [Fault.Kind] with what each does.
func FaultKinds() map[string]string {
	return map[string]string{
		faultResetBefore:  "TCP reset instead of an answer",
		faultResetAfter:   "TCP reset after the headers",
		faultResetMid:     "TCP reset in the middle of the body, or after some events of a stream",
		faultHang:         "no answer until the client leaves",
		faultHangMid:      "half the body, or some events, then nothing",
		faultDelay:        "the answer begins late",
		faultSlow:         "the body trickles",
		faultStatus:       "an error status",
		faultMalformed:    "an answer that is not JSON",
		faultTruncated:    "half of the JSON, with a content-length that fits",
		faultHuge:         "an answer padded with blanks",
		faultContentType:  "text/html as content type",
		faultNoHandle:     "a prefill answer without kv_transfer_params; its blocks stay pinned",
		faultOddHandle:    "a handle with big integers, escapes, nested unknown fields and another key order",
		faultTruncatedSSE: "a stream that ends inside an event, with a proper end of the body",
		faultSplitSSE:     "a stream cut at every byte, or into pieces of some bytes",
		faultFinishError:  "200 with finish_reason error, as a wedged pair answers",
		faultDie:          "the engine process ends",
	}
}

func (f *Faults) check() error {
	var errs []error
	for i, r := range f.Rules {
		if _, ok := FaultKinds()[r.Kind]; !ok {
			errs = append(errs, fmt.Errorf("rules[%d].kind: %q is not known", i, r.Kind))
		}
		if !slices.Contains([]string{"", phaseAny, phasePrefill, phaseTransfer, phasePlain, phaseDecode, phaseEncode, phaseQuery}, r.Phase) {
			errs = append(errs, fmt.Errorf("rules[%d].phase: %q is not known", i, r.Phase))
		}
		if r.At != "" && (r.Kind != faultDie || !slices.Contains(Checkpoints(), r.At)) {
			errs = append(errs, fmt.Errorf("rules[%d].at: %q, must be a checkpoint of a fault that dies: %s", i, r.At, strings.Join(Checkpoints(), ", ")))
		}
		if r.Probability < 0 || r.Probability > 1 {
			errs = append(errs, fmt.Errorf("rules[%d].probability: %v, must be 0 to 1", i, r.Probability))
		}
	}
	if _, ok := MetricsFaults()[f.Metrics]; !ok && f.Metrics != "" {
		errs = append(errs, fmt.Errorf("metrics: %q is not known", f.Metrics))
	}
	if _, ok := KVEventFaults()[f.KVEvents]; !ok && f.KVEvents != "" {
		errs = append(errs, fmt.Errorf("kv_events: %q is not known", f.KVEvents))
	}
	if f.KVEventsEvery < 0 {
		errs = append(errs, fmt.Errorf("kv_events_every: %d, must be 0 or more", f.KVEventsEvery))
	}
	if !slices.Contains(encoderFaults(), f.Encoder) {
		errs = append(errs, fmt.Errorf("encoder: %q is not known", f.Encoder))
	}
	return errors.Join(errs...)
}

// ParseFault reads a fault from one flag: "kind=status,phase=prefill,status=503,next=2". The keys are those of the JSON
// form.
func ParseFault(s string) (Fault, error) {
	var f Fault
	for pair := range strings.SplitSeq(s, ",") {
		key, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if err := f.setKey(key, value); err != nil {
			return f, fmt.Errorf("fault %q: %s: %w", s, key, err)
		}
	}
	if err := (&Faults{Rules: []Fault{f}}).check(); err != nil {
		return f, fmt.Errorf("fault %q: %w", s, err)
	}
	return f, nil
}

func (f *Fault) setKey(key, value string) error {
	texts := map[string]*string{
		"kind": &f.Kind, "phase": &f.Phase, "request_id": &f.RequestID, "attempt": &f.Attempt, "body": &f.Body, "retry_after": &f.RetryAfter, "at": &f.At,
	}
	ints := map[string]*int{
		"next": &f.Next, "status": &f.Status, "after": &f.After, "bytes_per_second": &f.BytesPerSecond, "delay_ms": &f.DelayMS, "size": &f.Size,
		"bytes": &f.Bytes, "restart_ms": &f.RestartMS,
	}
	var err error
	switch {
	case texts[key] != nil:
		*texts[key] = value
	case ints[key] != nil:
		*ints[key], err = strconv.Atoi(value)
	case key == "probability":
		f.Probability, err = strconv.ParseFloat(value, 64)
	case key == "late":
		f.Late = value == "" || value == "true"
	default:
		err = errors.New("unknown key")
	}
	return err
}

// faultState is the faults in force.
type faultState struct {
	mu     sync.Mutex
	faults Faults
	frozen [maxRanks]*meter // the metrics page's values while it is frozen, by rank
	told   int              // messages of KV events since the faults were set
}

func (s *faultState) set(f Faults) {
	rules := slices.Clone(f.Rules)
	for i := range rules {
		rules[i].Late = rules[i].Late || rules[i].At == atDone
		if rules[i].Next > 0 {
			rules[i].left = new(rules[i].Next)
		}
	}
	f.Rules = rules
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.frozen, s.told = f, [maxRanks]*meter{}, 0
}

func (s *faultState) get() Faults {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faults
}

// kvEvent returns what happens to the next message of KV events, "" for nothing.
func (s *faultState) kvEvent() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.told++; s.told%max(s.faults.KVEventsEvery, 1) != 0 {
		return ""
	}
	return s.faults.KVEvents
}

// pick returns the fault to inject into c, nil for none.
func (s *faultState) pick(e *Engine, c *call) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c == nil {
		return nil
	}
	for i := range s.faults.Rules {
		f := s.faults.Rules[i]
		if !f.matches(c) || (f.left != nil && *f.left == 0) || (f.Probability > 0 && !e.chance(f.Probability)) {
			continue
		}
		if f.left != nil {
			*f.left--
		}
		e.records.count(func(t *totals) { t.faults++ })
		return &f
	}
	return nil
}

func (f *Fault) matches(c *call) bool {
	switch f.Phase {
	case "", phaseAny:
	case phaseDecode:
		if slices.Contains([]string{phasePrefill, phaseEncode, phaseQuery}, c.phase) {
			return false
		}
	default:
		if c.phase != f.Phase {
			return false
		}
	}
	return (f.RequestID == "" || f.RequestID == c.requestID) && (f.Attempt == "" || f.Attempt == c.attempt)
}

// SetFaults replaces the engine's faults. A fault of an unknown kind is an error and changes nothing.
func (e *Engine) SetFaults(f Faults) error {
	if err := f.check(); err != nil {
		return err
	}
	e.faults.set(f)
	if p := e.running(); p != nil {
		return p.refuse(f.Refuse)
	}
	return nil
}

// Faults returns the faults in force.
func (e *Engine) Faults() Faults { return e.faults.get() }

func (f *Fault) after() int { return max(f.After, 1) }

func (f *Fault) delay() time.Duration { return time.Duration(f.DelayMS) * time.Millisecond }
