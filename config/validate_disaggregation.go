// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"math"
	"strings"
)

// maxAttempts bounds attempts per phase: pickers rank one endpoint more than that.
const maxAttempts = 10

func (v *validator) checkDisaggregation(d *Disaggregation) {
	const at = "disaggregation."
	v.oneOf(at+"mode", d.Mode, "auto", "orchestrate", "headers", "off")
	for engine, connector := range d.KVConnector {
		path := at + "kvConnector"
		if engine != "" {
			path = join(path, engine)
		}
		if connector == "" {
			v.fail(path, "must name a connector")
		}
	}
	if len(d.KVConnector) == 0 {
		v.fail(at+"kvConnector", "must name a connector")
	}
	if d.ECConnector != "" {
		v.oneOf(at+"ecConnector", d.ECConnector, "ec-example", "ec-nixl")
	}
	v.positive(at+"budget", d.Budget)
	v.positive(at+"holdResponse", d.HoldResponse)
	v.oneOf(at+"decodePick", d.DecodePick, "before", "after")
	v.oneOf(at+"onFailure", d.OnFailure, "aggregate", "fail")
	v.positive(at+"handleMaxAge", d.HandleMaxAge)
	v.oneOf(at+"rewriteRemoteHost", d.RewriteRemoteHost, "auto", "never")
	for _, port := range []struct {
		name  string
		value int
	}{
		{"sglang", d.Ports.SGLang},
		{"mooncake", d.Ports.Mooncake},
		{"p2p", d.Ports.P2P},
		{"lmcacheInit", d.Ports.LMCacheInit},
		{"lmcacheData", d.Ports.LMCacheData},
	} {
		within(v, at+"ports."+port.name, port.value, 1, math.MaxUint16)
	}
	for i, label := range d.PairLabels {
		if label == "" {
			v.fail(fmt.Sprintf("%spairLabels[%d]", at, i), "must name a label")
		}
	}
}

func (v *validator) checkSubRequests(d *Disaggregation) {
	const at = "disaggregation."
	v.positive(at+"prefill.timeout", d.Prefill.Timeout)
	v.positive(at+"prefill.connectTimeout", d.Prefill.ConnectTimeout)
	within(v, at+"prefill.attempts", d.Prefill.Attempts, 1, maxAttempts)
	v.atLeastOne(at+"prefill.maxConcurrentPerEndpoint", int64(d.Prefill.MaxConcurrentPerEndpoint))
	v.atLeastOne(at+"prefill.maxResponseBytes", d.Prefill.MaxResponseBytes)
	v.positive(at+"encode.timeout", d.Encode.Timeout)
	within(v, at+"encode.attempts", d.Encode.Attempts, 1, maxAttempts)
	v.atLeastOne(at+"encode.parallel", int64(d.Encode.Parallel))
	v.oneOf(at+"encode.embeds", d.Encode.Embeds, "safe", "lean")
	within(v, at+"retryBudget.ratio", d.RetryBudget.Ratio, 0, 1)
	within(v, at+"retryBudget.minPerSecond", d.RetryBudget.MinPerSecond, 0, math.MaxInt32)
	within(v, at+"breaker.failures", d.Breaker.Failures, 1, math.MaxInt32)
	v.positive(at+"breaker.openFor", d.Breaker.OpenFor)
	v.oneOf(at+"transport.scheme", d.Transport.Scheme, "http", "https")
	for i, h := range d.Transport.ForwardHeaders {
		if !validHeader(h) {
			v.fail(fmt.Sprintf("%stransport.forwardHeaders[%d]", at, i), "%s, must be a header name", show(h))
		}
	}
}

// validHeader reports whether s is an HTTP field name (RFC 9110 token).
func validHeader(s string) bool {
	const marks = "!#$%&'*+-.^_`|~"
	for _, c := range []byte(s) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && strings.IndexByte(marks, c) < 0 {
			return false
		}
	}
	return s != ""
}
