"""What a run will cost before it starts: FLOPs, memory, step time, and the layouts worth trying. No torch needed."""
