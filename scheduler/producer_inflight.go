// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"math"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
)

const typeInflightProducer = "inflight-load-producer"

// inflightLoad says how a request is counted on the endpoint that it is sent to. The counters themselves are those of
// pool.Load, which every candidate row shows whether this plugin is configured or not.
type inflightLoad struct {
	// AddEstimatedOutputTokens counts estimated output tokens of a decode, too; default false.
	AddEstimatedOutputTokens bool `yaml:"addEstimatedOutputTokens"`
	// OutputRatio is output tokens per prompt token; default 1.5.
	OutputRatio float64 `yaml:"outputRatio"`
	// MaxEstimatedOutputTokens bounds the estimate; absent = no bound.
	MaxEstimatedOutputTokens *int64 `yaml:"maxEstimatedOutputTokens"`
	// PrefixMatchInfoProducerName is the producer that tells the uncached tokens; empty = the default one.
	PrefixMatchInfoProducerName string `yaml:"prefixMatchInfoProducerName"`
	// SyncCrossReplicaState is accepted; replicas exchange nothing yet.
	SyncCrossReplicaState bool `yaml:"syncCrossReplicaState"`

	column int
}

func defaultInflight() *inflightLoad {
	return &inflightLoad{OutputRatio: 1.5, SyncCrossReplicaState: true}
}

func newInflightProducer(b *Builder, raw config.Parameters) (any, error) {
	p := defaultInflight()
	if err := raw.Decode(p); err != nil {
		return nil, err
	}
	switch {
	case p.OutputRatio < 0:
		return nil, raw.Errorf("outputRatio", "%v, must be ≥ 0", p.OutputRatio)
	case p.MaxEstimatedOutputTokens != nil && *p.MaxEstimatedOutputTokens < 0:
		return nil, raw.Errorf("maxEstimatedOutputTokens", "%d, must be ≥ 0", *p.MaxEstimatedOutputTokens)
	}
	if name := p.PrefixMatchInfoProducerName; name != "" {
		column, err := b.Prefix(name)
		if err != nil {
			return nil, raw.Errorf("prefixMatchInfoProducerName", "%v", err)
		}
		p.column = column
	}
	return p, nil
}

// outputTokens is the estimate min(round(prompt · ratio), the client's limit, maxEstimatedOutputTokens).
func (p *inflightLoad) outputTokens(req *inference.Request) int64 {
	if !p.AddEstimatedOutputTokens {
		return 0
	}
	tokens := int64(math.Round(float64(req.PromptTokens()) * p.OutputRatio))
	if req.MaxTokens > 0 {
		tokens = min(tokens, req.MaxTokens)
	}
	if p.MaxEstimatedOutputTokens != nil {
		tokens = min(tokens, *p.MaxEstimatedOutputTokens)
	}
	return tokens
}
