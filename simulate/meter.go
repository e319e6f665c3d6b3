// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"slices"
	"sync"
	"time"
)

// slotIndex names the live values that the engine itself moves.
type slotIndex struct {
	running, waiting, capacity, deferred, fetching, usage       int
	awake                                                       int
	prefixQueries, prefixHits, cachedDevice                     int
	externalQueries, externalHits, cachedPeer                   int
	promptTokens, sourceLocal, sourceCache, sourceRemote        int
	cachedTotal, generationTokens, preemptions, rejected        int
	failedTransfers, expired, lateNotifications                 int
	successStop, successLength, successError                    int
	ttft, itl, tpot, e2e, queueTime, inference, prefill, decode *histogram
	promptHist, generationHist, maxTokens, paramN, computed     *histogram
	xferTime, postTime, bytes, descriptors, preempted           *histogram
	mediaQueries, mediaHits                                     int
	maxGeneration, iteration                                    *histogram
}

// metricSlots is the index of the captured page.
var metricSlots = sync.OnceValue(func() *slotIndex {
	t := captured()
	at := func(key string) int {
		return t.index["vllm:"+key] // a test proves that each is there
	}
	h := func(name string) *histogram { return t.histogram("vllm:" + name) }
	return &slotIndex{
		running: at("num_requests_running"), waiting: at("num_requests_waiting"),
		capacity: at(`num_requests_waiting_by_reason{reason="capacity"}`), deferred: at(`num_requests_waiting_by_reason{reason="deferred"}`),
		fetching: at(`num_requests_kv_fetch_by_stage{stage="in_progress"}`), usage: at("kv_cache_usage_perc"),
		awake:         at(`engine_sleep_state{sleep_state="awake"}`),
		prefixQueries: at("prefix_cache_queries_total"), prefixHits: at("prefix_cache_hits_total"),
		cachedDevice:    at(`prompt_tokens_cached_by_source_total{source="device"}`),
		externalQueries: at("external_prefix_cache_queries_total"), externalHits: at("external_prefix_cache_hits_total"),
		cachedPeer: at(`prompt_tokens_cached_by_source_total{source="p2p"}`), promptTokens: at("prompt_tokens_total"),
		sourceLocal:  at(`prompt_tokens_by_source_total{source="local_compute"}`),
		sourceCache:  at(`prompt_tokens_by_source_total{source="local_cache_hit"}`),
		sourceRemote: at(`prompt_tokens_by_source_total{source="external_kv_transfer"}`),
		cachedTotal:  at("prompt_tokens_cached_total"), generationTokens: at("generation_tokens_total"),
		preemptions: at("num_preemptions_total"), rejected: at(`admission_rejections_total{reason="max_num_queued_reqs"}`),
		failedTransfers: at("nixl_num_failed_transfers_total"), expired: at("nixl_num_kv_expired_reqs_total"),
		lateNotifications: at("nixl_num_notifications_after_expiry_total"),
		successStop:       at(`request_success_total{finished_reason="stop"}`), successLength: at(`request_success_total{finished_reason="length"}`),
		mediaQueries: at("mm_cache_queries_total"), mediaHits: at("mm_cache_hits_total"),
		successError: at(`request_success_total{finished_reason="error"}`),
		ttft:         h("time_to_first_token_seconds"), itl: h("inter_token_latency_seconds"), tpot: h("request_time_per_output_token_seconds"),
		e2e: h("e2e_request_latency_seconds"), queueTime: h("request_queue_time_seconds"), inference: h("request_inference_time_seconds"),
		prefill: h("request_prefill_time_seconds"), decode: h("request_decode_time_seconds"), promptHist: h("request_prompt_tokens"),
		generationHist: h("request_generation_tokens"), maxTokens: h("request_params_max_tokens"), paramN: h("request_params_n"),
		computed: h("request_prefill_kv_computed_tokens"), xferTime: h("nixl_xfer_time_seconds"), postTime: h("nixl_post_time_seconds"),
		bytes: h("nixl_bytes_transferred"), descriptors: h("nixl_num_descriptors"), preempted: h("request_num_preemptions"),
		maxGeneration: h("request_max_num_generation_tokens"), iteration: h("iteration_tokens_total"),
	}
})

// meter holds the live values of one process's page, in the order of the captured one. It needs process.mu.
type meter struct {
	values  []float64
	created []byte // of every _created sample
	lora    []loraSeries
}

// clone is a copy that stays as it is.
func (m *meter) clone() *meter {
	return &meter{values: slices.Clone(m.values), created: m.created, lora: slices.Clone(m.lora)}
}

// loraSeries is one line of vllm:lora_requests_info; old ones stay for ever, as at a real server.
type loraSeries struct {
	running, waiting string
	at               float64 // Unix seconds
}

func (m *meter) init(now time.Time) {
	m.values = make([]float64, len(captured().index)+derivedCount)
	m.values[metricSlots().awake] = 1
	m.created = appendFloat(nil, unixSeconds(now))
}

func unixSeconds(t time.Time) float64 { return float64(t.UnixMicro()) / 1e6 }

func (m *meter) add(slot int, v float64) { m.values[slot] += v }

func (m *meter) get(slot int) float64 { return m.values[slot] }

// observe adds v to a histogram n times.
func (m *meter) observe(h *histogram, v float64, n int) {
	for i := len(h.bounds) - 1; i >= 0 && v <= h.bounds[i]; i-- {
		m.values[h.buckets[i]] += float64(n)
	}
	m.values[h.count] += float64(n)
	m.values[h.sum] += v * float64(n)
}

// externalHit counts the tokens that are to come by a pull; as at a real server also when the pull then fails.
func (m *meter) externalHit(g *group) {
	s := metricSlots()
	for _, q := range g.seqs {
		n := float64(q.prompt - q.cached)
		m.add(s.externalHits, n)
		m.add(s.cachedPeer, n)
	}
}

// pulled counts a transfer that worked.
func (m *meter) pulled(rec Pull, t timing) {
	s := metricSlots()
	took := t.transferFixed + time.Duration(rec.Tokens)*t.transferPerToken
	m.observe(s.xferTime, took.Seconds(), 1)
	m.observe(s.postTime, took.Seconds()/30, 1)
	m.observe(s.bytes, float64(rec.Bytes), 1)
	m.observe(s.descriptors, float64(2*rec.runs), 1) // one for the keys and one for the values
}

// prefilled counts the prompts of a group whose KV is there.
func (m *meter) prefilled(g *group, c *call, queued, took time.Duration) {
	s := metricSlots()
	tokens := 0
	for _, q := range g.seqs {
		local := q.prompt - q.cached - q.remote
		m.add(s.promptTokens, float64(q.prompt))
		m.add(s.sourceLocal, float64(local))
		m.add(s.sourceCache, float64(q.cached))
		m.add(s.sourceRemote, float64(q.remote))
		m.add(s.cachedTotal, float64(q.cached+q.remote))
		m.observe(s.promptHist, float64(q.prompt), 1)
		m.observe(s.computed, float64(q.prompt-q.cached), 1) // what was pulled counts, too
		m.observe(s.maxTokens, float64(c.limit(q)), 1)
		m.observe(s.maxGeneration, float64(c.limit(q)), 1)
		m.observe(s.queueTime, queued.Seconds(), 1)
		m.observe(s.prefill, took.Seconds(), 1)
		m.observe(s.ttft, time.Since(g.arrived).Seconds(), 1)
		tokens += local + 1
	}
	m.observe(s.iteration, float64(tokens), 1)
	m.observe(s.paramN, float64(c.n), 1)
}

// finished counts complete requests; reason overrides the answers' own.
func (m *meter) finished(g *group, reason string) {
	s := metricSlots()
	now := time.Now()
	for _, q := range g.seqs {
		why := q.finish
		if reason != "" {
			why = reason
		}
		switch why {
		case finishStop:
			m.add(s.successStop, 1)
		case finishLength:
			m.add(s.successLength, 1)
		default:
			m.add(s.successError, 1)
		}
		m.observe(s.e2e, now.Sub(g.arrived).Seconds(), 1)
		m.observe(s.generationHist, float64(len(q.generated)), 1)
		m.observe(s.preempted, 0, 1)
		if g.first.IsZero() {
			continue
		}
		took := now.Sub(g.first).Seconds()
		m.observe(s.decode, took, 1)
		m.observe(s.inference, now.Sub(g.arrived).Seconds(), 1)
		if n := len(q.generated) - 1; n > 0 {
			m.observe(s.itl, took/float64(n), n)
			m.observe(s.tpot, took/float64(n), 1)
		}
	}
}
